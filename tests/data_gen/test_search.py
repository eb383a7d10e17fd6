"""Search, rewriting and pairs, with a teacher that is a function."""

import asyncio
import json

import pytest

from data_gen.answers import judge
from data_gen.pairs import make_pairs
from data_gen.prompting import load_prompts
from data_gen.records import Candidate, Problem, Rejected, Sft, Step, Trace
from data_gen.rewrite import Rewriter, parse_reasoning, parse_response, render_simply, render_trace
from data_gen.search import Searcher, conclusion_of, parse_initial, parse_rethought
from data_gen.teacher import Unreadable
from data_gen.verifier_samples import verifier_samples
from data_gen.verifiers import RuleVerifier

PROMPTS = load_prompts("en")
WEIGHTS = {"explore": 1.0, "backtrack": 1.0, "verify_again": 1.0, "correct": 1.0}
PROBLEM = Problem.model_validate({"question": "How much?", "answer": "80 mg", "split": "search"})


def thinking(text, title="Step"):
    return {"action": "Inner Thinking", "title": title, "content": text}


def conclusion(text):
    return {"action": "Final Conclusion", "content": text}


VERIFICATION = {"action": "Verification", "content": "checked"}
AGREED = {"action": "Verification", "content": "the reviewer is right"}


def chain(answer, rethought=False, text="so"):
    steps = [thinking(text), conclusion(answer), VERIFICATION]
    return json.dumps({"CoT": [AGREED, *steps] if rethought else steps})


def strategy_of(prompt):
    if prompt.startswith("You solve"):
        return "initial_cot"
    return next(name for name in WEIGHTS if prompt.startswith(PROMPTS[name][:130]) and (
        PROMPTS[name].split("Strategy: ")[1].split(".")[0] in prompt))  # fmt: skip


def search(scripted, answers, problem=PROBLEM, seed=0, **settings):
    """Search with a teacher whose n-th conclusion is answers[n]; returns result and teacher."""
    count = iter(answers)

    def script(prompt, sample):
        reply = next(count)
        return (
            reply if isinstance(reply, list) else chain(reply, not prompt.startswith("You solve"))
        )

    teacher = scripted(script)
    defaults = {"max_depth": 3, "max_restarts": 3, "fresh_restart": True, "backtrack_from": 2}
    options = {"weights": WEIGHTS, **defaults, **settings}
    searcher = Searcher(teacher, RuleVerifier(), PROMPTS, seed=seed, **options)
    return asyncio.run(searcher.search(problem)), teacher


def test_a_right_first_conclusion_ends_the_search(scripted):
    trace, teacher = search(scripted, ["80 mg"])
    assert isinstance(trace, Trace)
    assert (trace.strategies, trace.verdicts, trace.attempts) == (["initial_cot"], ["true"], 1)
    assert trace.failed == [] and len(teacher.prompts) == 1
    assert trace.label_conditioned is False


def test_new_steps_replace_the_last_verification(scripted):
    trace, teacher = search(scripted, ["70 mg", "80 mg"])
    assert isinstance(trace, Trace)
    actions = [step.action for step in trace.steps]
    think, conclude, verify = "Inner Thinking", "Final Conclusion", "Verification"
    assert actions == [think, conclude, verify, think, conclude, verify]
    assert trace.steps[2].content == "the reviewer is right"
    assert [conclusion_of(steps) for steps in trace.failed] == ["70 mg"]
    shown = json.loads(teacher.prompts[1].split("Previous reasoning: ")[1])
    assert [step["action"] for step in shown] == [think, conclude]


def test_depth_and_restarts_are_bounded_and_the_reject_keeps_the_attempts(scripted):
    record, teacher = search(scripted, ["70 mg"] * 12)
    assert isinstance(record, Rejected)
    assert (record.stage, record.reason) == ("search", "not verified")
    assert len(teacher.prompts) == 12
    assert sum(prompt.startswith("You solve") for prompt in teacher.prompts) == 3
    assert len(record.model_dump()["failed"]) == 12


def test_without_fresh_restarts_the_first_chain_is_asked_once(scripted):
    _, teacher = search(scripted, ["70 mg"] * 10, fresh_restart=False)
    assert sum(prompt.startswith("You solve") for prompt in teacher.prompts) == 1
    assert len(teacher.prompts) == 10


def test_the_first_rethink_never_backtracks_and_later_ones_may(scripted):
    first, later = set(), set()
    for i in range(60):
        problem = Problem.model_validate({"question": f"q{i}", "answer": "80 mg"})
        record, _ = search(scripted, ["70 mg"] * 4, problem, max_restarts=1)
        assert isinstance(record, Rejected)
        strategies = record.model_dump()["strategies"]
        first.add(strategies[1])
        later.update(strategies[2:])
    assert first == {"explore", "verify_again", "correct"}
    assert later == set(WEIGHTS)


def test_strategies_depend_on_seed_and_problem_only(scripted):
    runs = [search(scripted, ["70 mg"] * 12, seed=seed)[0] for seed in (0, 0, 1)]
    first, again, other = (run.model_dump()["strategies"] for run in runs)
    assert first == again != other


def test_weights_of_zero_are_never_drawn(scripted):
    weights = {**WEIGHTS, "explore": 0.0, "backtrack": 0.0, "correct": 0.0}
    record, _ = search(scripted, ["70 mg"] * 12, weights=weights)
    assert set(record.model_dump()["strategies"]) == {"initial_cot", "verify_again"}


def test_a_chain_that_is_told_the_answer_comes_last_is_tagged_and_is_judged(scripted):
    settings = {"max_depth": 1, "max_restarts": 2, "label_conditioned": True}
    trace, teacher = search(scripted, ["70 mg"] * 4 + ["80 mg"], **settings)
    assert isinstance(trace, Trace) and trace.label_conditioned
    assert (trace.strategies[-1], trace.verdicts) == ("label_cot", ["false"] * 4 + ["true"])
    assert "True answer: 80 mg" in teacher.prompts[-1]
    assert not any("True answer" in prompt for prompt in teacher.prompts[:-1])
    record, teacher = search(scripted, ["70 mg"] * 5, **settings)
    assert isinstance(record, Rejected) and record.reason == "not verified"
    record, teacher = search(scripted, ["70 mg"] * 4, **{**settings, "label_conditioned": False})
    assert isinstance(record, Rejected) and len(teacher.prompts) == 4


def test_a_problem_with_options_is_asked_and_judged_with_them(scripted):
    options = {"A": "70 mg", "B": "80 mg"}
    problem = Problem.model_validate({"question": "How?", "answer": "80 mg", "options": options})
    trace, teacher = search(scripted, ["A", "B"], problem)
    assert isinstance(trace, Trace) and trace.verdicts == ["false", "true"]
    assert all("How?\nA. 70 mg\nB. 80 mg" in prompt for prompt in teacher.prompts)


def test_an_attempt_that_nobody_can_judge_is_kept_as_unscored(scripted):
    problem = Problem.model_validate({"question": "How?", "answer": "Z", "options": {"A": "x"}})
    record, _ = search(scripted, ["A"] * 3, problem)
    assert isinstance(record, Rejected) and record.reason == "unscored"
    dumped = record.model_dump()
    assert len(dumped["unscored"]) == 3 and dumped["failed"] == []


def test_an_unreadable_chain_is_restarted_and_named_if_all_are(scripted):
    trace, _ = search(scripted, [["{", "{"], "80 mg"])
    assert isinstance(trace, Trace) and trace.model_dump()["restart"] == 1
    record, _ = search(scripted, [["{", "{"]] * 3)
    assert isinstance(record, Rejected) and record.reason == "unreadable"


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        ([conclusion("x"), VERIFICATION], "last three steps"),
        ([thinking("a"), conclusion("x")], "last three steps"),
        ([thinking("a"), VERIFICATION, thinking("b"), conclusion("x"), VERIFICATION], "before the"),
        ([{"action": "Inner Thinking", "content": "a"}, conclusion("x"), VERIFICATION], "title"),
        ([thinking(""), conclusion("x"), VERIFICATION], "content"),
        ([{"action": "Musing", "content": "a"}, conclusion("x"), VERIFICATION], "action"),
        (["a", conclusion("x"), VERIFICATION], "step 1"),
        ("none", "list of steps"),
        ([], "last three steps"),
    ],
)
def test_a_chain_of_thought_has_its_steps_in_order(steps, complaint):
    with pytest.raises(Unreadable, match=complaint):
        parse_initial(json.dumps({"CoT": steps}))


def test_a_strategy_starts_with_a_verification():
    with pytest.raises(Unreadable, match="first step"):
        parse_rethought(chain("80 mg"))
    assert parse_rethought(chain("80 mg", rethought=True))[0].action == "Verification"


# --- rewriting --------------------------------------------------------------------------------

STEPS = [Step.model_validate(step) for step in (
    thinking("a", "One"), conclusion("70 mg"), AGREED, thinking("b", "Two"), thinking("c", "Three"),
    conclusion("80 mg"), VERIFICATION,
)]  # fmt: skip
TRACE = Trace.model_validate(
    {"problem_id": PROBLEM.id, "steps": STEPS, "verdicts": ["false", "true"]}
    | {"strategies": ["initial_cot", "explore"], "attempts": 2, "failed": [STEPS[:3]]}
)


def rewrite(scripted, reasoning, response, **shares):
    def script(prompt, sample):
        return reasoning if prompt.startswith("You rewrite") else response

    rewriter = Rewriter(scripted(script), RuleVerifier(), PROMPTS, shares, seed=0)
    return asyncio.run(rewriter.rewrite(PROBLEM, TRACE))


NATURAL = json.dumps({"NaturalReasoning": "hmm\nso 80 mg"})


def test_a_trace_becomes_natural_reasoning_and_a_response(scripted):
    result = rewrite(scripted, NATURAL, "80 mg", direct=1.0, simple_cot=1.0)
    by_kind = {record.kind: record for record in result.records}
    assert by_kind["complex_cot"].thinking == "hmm\nso 80 mg"
    assert by_kind["direct"].thinking == ""
    assert by_kind["simple_cot"].thinking == "b\nc"
    assert {record.response for record in result.records} == {"80 mg"}
    assert by_kind["complex_cot"].messages[0].content == "How much?"


def test_a_response_that_lost_the_answer_is_rejected_and_quoted(scripted):
    result = rewrite(scripted, NATURAL, "90 mg")
    assert result.records == []
    assert result.rejected is not None and result.rejected.reason == "answer lost"
    assert "90 mg (reference: 80 mg)" in result.rejected.detail


def test_reasoning_needs_line_breaks_and_no_format_headings():
    for text in ("one line", "a\n## Final Response\n\nb", " \n "):
        with pytest.raises(Unreadable):
            parse_reasoning(json.dumps({"NaturalReasoning": text}))
    for text in ("", "## Thinking\n\nx", "80 mg\n\n## Final Response\n\n90 mg"):
        with pytest.raises(Unreadable):
            parse_response(text)


def test_the_rendered_trace_has_every_step_under_its_heading():
    assert render_trace(STEPS[:3]) == (
        "### One\na\n\n### Conclusion\n70 mg\n\n### Verification\nthe reviewer is right"
    )
    assert render_simply(STEPS[:3]) == "a"


# --- pairs ------------------------------------------------------------------------------------

SFT = Sft.model_validate(
    {"messages": [{"role": "user", "content": PROBLEM.question}], "thinking": "hmm\n80"}
    | {"response": "80 mg", "problem_id": PROBLEM.id}
)


def pairs(candidates=(), **settings):
    defaults = {"chosen": ["sft", "sample"], "rejected": ["trace", "sample"], "seed": 0}
    options = {**defaults, "explain": [True, False], "k": 2, "cap": None, **settings}
    return make_pairs([PROBLEM], [SFT], [TRACE], candidates, **options)


def candidate(response, correct, explain=True, text=None, thinking="t", **fields):
    return Candidate.model_validate(
        {"problem_id": PROBLEM.id, "explain": explain, "thinking": thinking, "text": text}
        | {"response": response, "correct": correct, **fields}
    )


def test_a_failed_attempt_is_rejected_with_and_without_its_reasoning():
    found = {pair.explain: pair for pair in pairs().pairs}
    assert set(found) == {True, False}
    assert (found[True].chosen.thinking, found[True].rejected.thinking) == ("hmm\n80", "a")
    assert (found[False].chosen.thinking, found[False].rejected.thinking) == ("", "")
    for pair in found.values():
        assert judge(pair.chosen.response, PROBLEM.answer).outcome == "true"
        assert judge(pair.rejected.response, PROBLEM.answer).outcome == "false"
        assert (pair.chosen_kind, pair.rejected_kind) == ("complex_cot", "trace")


def test_both_lists_are_walked_in_parallel_and_wrap_round():
    samples = [candidate(f"{mg} mg", False) for mg in (10, 20, 30)]
    samples += [candidate("80 mg", True, thinking=f"r{i}") for i in range(2)]
    options = {"chosen": ["sample"], "rejected": ["sample"], "explain": [True]}
    found = pairs(samples, k=4, **options).pairs
    walked = {(pair.chosen.thinking, pair.rejected.response) for pair in found}
    assert walked == {("r0", "10 mg"), ("r1", "20 mg"), ("r0", "30 mg"), ("r1", "10 mg")}
    assert {pair.chosen_kind for pair in found} == {"sample"}
    assert len(pairs(samples, k=100, **options).pairs) == 6


def test_what_cannot_be_paired_is_counted():
    samples = [
        candidate("10 mg", None),
        candidate(None, False, text="no format"),
        candidate("10 mg", False, problem_id="unknown"),
    ]
    left_out = pairs(samples).left_out
    assert left_out["sample unscored"] == 1
    assert left_out["sample without the think format"] == 1
    assert left_out["sample of an unknown problem"] == 1


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize(("explain", "thinking"), [(True, ""), (True, None), (False, "t")])
def test_a_sample_that_thinks_where_its_form_does_not_is_left_out(correct, explain, thinking):
    sample = candidate("80 mg" if correct else "10 mg", correct, explain, thinking=thinking)
    found = pairs([sample])
    assert found.left_out == {"sample's thinking does not fit its form": 1}
    assert found.pairs == pairs().pairs
    assert all(bool(s.thinking) == p.explain for p in found.pairs for s in (p.chosen, p.rejected))


def test_a_failed_attempt_that_the_rule_finds_right_is_no_wrong_answer():
    falsely = TRACE.model_copy(update={"failed": [STEPS]})
    options = {"chosen": ["sft"], "rejected": ["trace"], "explain": [True], "k": 2, "cap": None}
    found = make_pairs([PROBLEM], [SFT], [falsely], [], seed=0, **options)
    assert found.pairs == []
    assert found.left_out == {"attempt is right by the rule": 1, "no wrong answer": 1}


def test_the_letter_alone_is_no_side_of_a_pair_since_its_prompt_is_another():
    letter = SFT.model_copy(update={"kind": "option_only", "thinking": "", "response": "B. 80 mg"})
    options = {"chosen": ["sft"], "rejected": ["trace"], "explain": [False], "k": 4, "cap": None}
    assert make_pairs([PROBLEM], [letter], [TRACE], [], seed=0, **options).pairs == []


def test_a_conclusion_that_was_judged_both_ways_teaches_a_verifier_nothing():
    problem = PROBLEM.model_copy(update={"id": TRACE.problem_id})
    both = TRACE.model_copy(update={"failed": [STEPS[:3], STEPS]})
    found = verifier_samples([problem], [both], "teacher")
    assert [(sample.conclusion, sample.label) for sample in found] == [("70 mg", False)]
    found = verifier_samples([problem], [TRACE], "teacher")
    assert {(sample.conclusion, sample.label) for sample in found} == {
        ("70 mg", False),
        ("80 mg", True),
    }


def test_an_unverified_answer_stands_between_a_right_and_a_wrong_one():
    unsure = candidate("about 80 mg", None)
    assert pairs([unsure]).left_out["sample unscored"] == 1
    options = {"chosen": ["sft"], "rejected": ["unverified", "trace"], "explain": [True]}
    trace = TRACE.model_copy(update={"unscored": [STEPS[3:]]})
    options |= {"k": 5, "cap": None, "seed": 0}
    found = make_pairs([PROBLEM], [SFT], [trace], [unsure], **options).pairs
    ranked = {(pair.chosen_tier, pair.rejected_tier, pair.rejected_kind) for pair in found}
    assert ranked == {
        ("verified", "wrong", "trace"),
        ("verified", "unverified", "unverified"),
    }
    assert len(found) == 3


def test_the_banks_explanation_is_preferred_and_two_sides_of_one_tier_make_no_pair():
    explained = PROBLEM.model_copy(update={"explanation": "8 x 10 is 80.\nSo 80 mg."})
    options = {"chosen": ["ground_truth", "sft"], "rejected": ["sft"], "explain": [True], "seed": 0}
    [pair] = make_pairs([explained], [SFT], [], [], k=4, cap=None, **options).pairs
    assert (pair.chosen_tier, pair.rejected_tier) == ("ground_truth", "verified")
    assert pair.chosen.thinking == "8 x 10 is 80.\nSo 80 mg."
    found = make_pairs([PROBLEM], [SFT], [], [], k=4, cap=None, **options)
    assert (found.pairs, found.left_out) == ([], {"no wrong answer": 1})


@pytest.mark.parametrize("split", ["dev", "test"])
def test_held_out_problems_give_no_pairs(split):
    held = PROBLEM.model_copy(update={"split": split})
    options = {"chosen": ["sft"], "rejected": ["trace"], "explain": [True], "k": 2, "cap": None}
    assert make_pairs([held], [SFT], [TRACE], [], seed=0, **options).pairs == []


def test_the_cap_keeps_the_same_pairs_in_any_order():
    samples = [candidate(f"{mg} mg", False) for mg in range(10, 70, 10)]
    capped = pairs(samples, k=20, cap=3)
    assert len(capped.pairs) == 3
    assert {p.id for p in pairs(samples[::-1], k=20, cap=3).pairs} == {p.id for p in capped.pairs}
    assert capped.left_out["over the cap"] > 0
