"""The gate after an export: the folder, opened by `transformers`, is the model that we have."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medreason_jax.generate.sampling import Sampling
from medreason_jax.mesh import batch_shards, gather_to_host, put_batch
from medreason_jax.qwen2.load import Loaded

LOGIT_ERROR = 1e-4  # relative norm, float32
NEAR_TIE = 1e-4  # two best logits closer than this may be ordered either way


def parity_gate(
    folder: Path, model: Loaded, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> dict[str, Any]:
    """Compare logits and greedy answers with `transformers`; RuntimeError when they differ."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise RuntimeError(
            "the parity gate needs torch and transformers: pip install 'medreason[export]'"
        ) from None

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = model.engine(len(prompts))
    greedy = engine.generate(model.params, prompts, Sampling(0.0, 0, 1.0, max_new_tokens), seed=0)
    worst, compared, ties = 0.0, 0, 0
    for prompt, completion in zip(prompts, greedy, strict=True):
        ids = [*prompt, *completion.ids]
        with torch.inference_mode():
            theirs = reference(torch.tensor([ids])).logits[0].numpy()
            answer = reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=max_new_tokens,
            )[0, len(prompt) :].tolist()
        ours = _logits(model, ids)
        worst = max(worst, float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)))
        for place, token in enumerate(answer):
            best = np.sort(theirs[len(prompt) + place - 1])[-2:]
            if best[1] - best[0] < NEAR_TIE:
                ties += 1
                break
            if place >= len(completion.ids) or completion.ids[place] != token:
                raise RuntimeError(
                    f"{folder}: transformers answers differently at token {place} of a sample"
                )
            compared += 1
    if worst > LOGIT_ERROR:
        raise RuntimeError(
            f"{folder}: logits differ from transformers' by {worst:.2e}, allowed {LOGIT_ERROR}"
        )
    return {"mode": "full", "logit_error": worst, "greedy_tokens": compared, "near_ties": ties}


def _logits(model: Loaded, ids: list[int]) -> np.ndarray:
    """Logits [T, V] of one row, which is repeated so that every batch shard has one."""
    tokens = np.tile(np.asarray(ids, np.int32), (batch_shards(model.mesh), 1))
    batch = {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(len(ids), dtype=np.int32), tokens.shape),
        "segments": np.ones_like(tokens),
    }

    @jax.jit
    def logits(params, batch):
        h_BTD = model.network.hidden(params, batch["tokens"], batch["positions"], batch["segments"])
        return h_BTD @ model.network.vocabulary_kernel(params).T

    return gather_to_host(logits(model.params, put_batch(model.mesh, batch)))[0]
