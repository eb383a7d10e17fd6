"""Strict models of a recipe: data, model, stages in order, controls and the evaluation."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from medreason_jax.config import MeshConfig, Name, Positive, Seed, Share, Strict


class ModelSizes(Strict):
    """A Qwen2.5 architecture; the vocabulary is the tokenizer's when not given."""

    vocab_size: Positive | None = None
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    max_position_embeddings: Positive = 32768
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    rope_theta: Annotated[float, Field(gt=0)] = 1e6
    tie_word_embeddings: bool = True
    initializer_range: Annotated[float, Field(gt=0)] = 0.02


class ModelConfig(Strict):
    """Where the base model comes from: a folder, or random weights of the given sizes."""

    folder: Path | None = None
    sizes: ModelSizes | None = None

    @model_validator(mode="after")
    def _one_source(self):
        if (self.folder is None) == (self.sizes is None):
            raise ValueError("give model.folder or model.sizes, one of the two")
        return self


class TokenizerConfig(Strict):
    """A tokenizer folder, or one trained on the recipe's corpus."""

    folder: Path | None = None
    vocab_size: Annotated[int, Field(ge=300)] | None = None
    system: str | None = None

    @model_validator(mode="after")
    def _trained_or_given(self):
        trained = self.vocab_size is not None and self.system is not None
        given = self.vocab_size is None and self.system is None
        if not (given if self.folder is not None else trained or given):
            raise ValueError("give folder, or vocab_size and system for one that is trained")
        return self


class QuestionBankConfig(Strict):
    """A bank in MedQA's format (`data-gen check` writes one), split by group, and texts.

    `questions` and `documents` take the first ones only; without a corpus there is no pretraining.
    """

    path: Path
    source: str = "own"
    language: str = "en"
    questions: Positive | None = None
    dev_share: Share = 0.05
    test_share: Share = 0.15
    corpus: Path | None = None
    documents: Positive | None = None

    @model_validator(mode="after")
    def _leaves_training(self):
        if self.dev_share + self.test_share >= 1:
            raise ValueError(
                f"dev_share={self.dev_share} and test_share={self.test_share} leave nothing to "
                "train on; together they are below 1"
            )
        if self.documents is not None and self.corpus is None:
            raise ValueError(f"documents={self.documents} has no effect without a corpus")
        return self


class CandidatesConfig(Strict):
    """Samples of the model before preference optimisation, as material for pairs."""

    problems: Positive
    samples: Positive = 4
    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_new_tokens: Positive = 96


RESERVED = {"base", "compile_cache", "data", "export", "lock", "report", "tokenizer"}
OWNED = {"kind", "folder", "model", "sources", "problems", "seed", "dtype", "mesh"}


class StageConfig(Strict):
    """One stage of a recipe; `settings` are fields of TrainConfig or PPOConfig."""

    name: Name
    kind: Literal["cpt", "sft", "prefer", "ppo"]
    start: str | None = None  # the stage whose model it starts from; the one before when not given
    replay: Share = 0.0  # share of pretraining rows mixed into SFT
    candidates: CandidatesConfig | None = None
    settings: dict[str, Any]

    @model_validator(mode="after")
    def _fitting_options(self):
        if self.name in RESERVED:
            raise ValueError(f"the stage name {self.name!r} is taken; reserved: {sorted(RESERVED)}")
        owned = sorted(OWNED & set(self.settings))
        if owned:
            raise ValueError(f"settings of stage {self.name!r}: the recipe itself sets {owned}")
        if self.replay > 0 and self.kind != "sft":
            raise ValueError(
                f"replay={self.replay} is for kind sft, stage {self.name!r} is {self.kind}"
            )
        if self.candidates is not None and self.kind != "prefer":
            raise ValueError(f"candidates are for kind prefer, stage {self.name!r} is {self.kind}")
        return self


class RecipeEvaluation(Strict):
    """Settings of the evaluations after each stage; `part` is the headline of the table.

    With `sampled` explanations are also drawn at temperature 1, as PPO draws them. On `gap_parts`
    together the explanation gap is measured: accuracy without minus accuracy with explanation.
    """

    part: str
    split: Literal["test", "dev"] = "test"
    slots: Positive = 256
    max_new_tokens: Positive = 1024
    answer_only_tokens: Positive = 64
    sampled: bool = False
    gap_parts: tuple[str, ...] = ()


class ControlConfig(StageConfig):
    """A stage for comparison only, run after all others by `medreason run --controls`.

    `pairs_of` gives it another stage's preference pairs; with `seconds_of` it has as many steps, at
    the pace of the stage that it starts from, as fill the seconds of that other stage.
    """

    against: str  # the stage that it is compared with
    pairs_of: str | None = None
    seconds_of: str | None = None

    @model_validator(mode="after")
    def _fitting_control(self):
        if self.start is None:
            raise ValueError(f"control {self.name!r}: give start, the stage that it starts from")
        if (self.pairs_of is not None) != (self.kind == "prefer") or self.kind == "ppo":
            raise ValueError(
                f"control {self.name!r} is kind {self.kind}; allowed: cpt, sft, and prefer with "
                "pairs_of"
            )
        if self.candidates is not None:
            raise ValueError(f"control {self.name!r}: candidates have no effect, pairs_of has them")
        given = {"steps", "epochs"} & set(self.settings)
        if self.seconds_of is not None and given:
            raise ValueError(f"control {self.name!r}: seconds_of sets the steps; remove {given}")
        return self


class RecipeConfig(Strict):
    name: Name
    seed: Seed = 0
    runs: Path = Path("runs")
    not_for_reporting: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: MeshConfig = MeshConfig()
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    formulary: dict[str, Any] | None = None
    question_bank: QuestionBankConfig | None = None
    data_gen: dict[str, Any]
    stages: Annotated[list[StageConfig], Field(min_length=1)]
    controls: tuple[ControlConfig, ...] = ()
    evaluation: RecipeEvaluation

    @model_validator(mode="after")
    def _connected(self):
        teacher = self.data_gen.get("teacher")
        if not isinstance(teacher, dict) or not all(isinstance(r, dict) for r in teacher.values()):
            raise ValueError("data_gen.teacher: give a reasoner, with base_url or simulated")
        owned = sorted({"bank", "out", "seed"} & set(self.data_gen))
        if owned:
            raise ValueError(f"data_gen: the recipe itself sets {owned}")
        if self.model.folder is not None and self.tokenizer != TokenizerConfig():
            raise ValueError("tokenizer has no effect: model.folder brings its own; remove it")
        bank = self.question_bank
        if self.tokenizer.vocab_size is not None and bank is not None and bank.corpus is None:
            raise ValueError("tokenizer.vocab_size: training one needs question_bank.corpus")
        if self.model.sizes is not None and self.tokenizer == TokenizerConfig():
            raise ValueError("tokenizer: give folder, or vocab_size and system to train one")
        if (self.formulary is None) == (self.question_bank is None):
            raise ValueError("give formulary or question_bank, one of the two")
        seen = ["base"]
        texts = self.question_bank is None or self.question_bank.corpus is not None
        for stage in [*self.stages, *self.controls]:
            if (stage.kind == "cpt" or stage.replay > 0) and not texts:
                raise ValueError(
                    f"stages.{stage.name} trains on texts: give question_bank.corpus, or leave it "
                    "out (replay: 0)"
                )
        for stage in self.stages:
            if stage.name in seen:
                raise ValueError(f"stages: the name {stage.name!r} is used twice")
            if stage.start is not None and stage.start not in seen:
                raise ValueError(
                    f"stages.{stage.name}.start={stage.start!r} is no stage before it; "
                    f"allowed: {seen}"
                )
            seen.append(stage.name)
        paired = [stage.name for stage in self.stages if stage.kind == "prefer"]
        stepped = [stage.name for stage in self.stages if stage.kind != "ppo"]
        for control in self.controls:
            starts = seen if control.seconds_of is None else stepped  # whose pace it takes
            others = {"start": starts, "against": seen[1:]}
            others |= {"pairs_of": [None, *paired], "seconds_of": [None, *seen[1:]]}
            for field, allowed in others.items():
                if getattr(control, field) not in allowed:
                    raise ValueError(
                        f"controls.{control.name}.{field}={getattr(control, field)!r} does not "
                        f"fit; allowed: {allowed}"
                    )
        names = [stage.name for stage in [*self.stages, *self.controls]]
        if len(set(names)) < len(names):
            raise ValueError(f"controls: a name is used twice among {names}")
        return self
