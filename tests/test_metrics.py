"""The metric log after a kill: whole lines up to the checkpoint, whatever their text holds."""

import json

from medreason_jax.metrics import MetricLog, truncate_after


def test_a_resumed_log_has_no_seam(tmp_path):
    log = MetricLog(tmp_path, 0, True)
    for step in range(1, 6):
        log.write(step, {"loss": float(step)}, {"step_seconds": 0.1})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    log = MetricLog(tmp_path, 3, True)
    log.write(4, {"loss": 4.0}, {})
    log.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == [{"step": step, "loss": float(step)} for step in range(1, 5)]


def test_line_separators_inside_a_text_do_not_end_a_record(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    records = [{"step": 1, "text": "a\u2028b\u0085c"}, {"step": 2, "text": "d"}]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    truncate_after(path, 1)
    assert json.loads(path.read_text(encoding="utf-8")) == records[0]
