"""The config: two levels, typed, every key known. YAML file plus ``section.key=value`` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from rlhf import algorithms

Beta = Annotated[float, Field(ge=0, lt=1)]
Temperature = Annotated[float, Field(ge=1e-4, le=1e4)]
Root = TypeVar("Root", bound="Section")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunSection(Section):
    name: str
    dir: Path = Path("runs")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Run(RunSection):
    steps: PositiveInt


class ModelSection(Section):
    """``path`` None: the recipe makes the model (its ``initial_model``)."""

    path: str | None = None
    revision: str = "main"
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False


class RecipeSection(Section):
    path: str  # a module name, or a .py file


class Data(Section):
    """Prompts: a Hub id, a folder (``save_to_disk``, or files that ``datasets`` loads), a .jsonl or a .parquet file.

    ``path`` None: the recipe's own ``prompts``. ``eval_split`` None: some rows of the training split are held out.
    ``prompt`` names the column with the text, or with chat messages. ``chat_template`` auto: the tokenizer's, where it
    has one; none: texts go to the model as they are. ``system`` opens every conversation that has no such message.
    """

    path: str | None = None
    subset: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    prompt: str = "prompt"
    system: str | None = None
    chat_template: Annotated[str, Field(pattern=r"^(auto|none|.*\.jinja)$")] = "auto"
    template_args: dict[str, Any] = {}  # for the template: {enable_thinking: false}
    max_prompt_tokens: PositiveInt = 512  # longer prompts are dropped, and counted


class WarmStart(Section):
    """Supervised steps before the RL starts, on the recipe's ``warm_start`` rows; 0 skips them. They end early
    once the mean loss of the last eight is at most ``until_loss``."""

    steps: NonNegativeInt = 0
    until_loss: NonNegativeFloat = 0.0
    batch_size: PositiveInt = 256
    lr: PositiveFloat = 1e-3


ComponentName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]  # a part of a component's is NAME/part


class Reward(Section):
    """Who judges the answers: the recipe's ``reward`` (the component ``function``), reward models (checkpoints by name)
    and HTTP reward servers (addresses by name). The reward is the sum of weight x component; a component that isn't in
    ``weights`` has 1, one of weight 0 is judged and logged and counts nothing.

    ``model_scale`` probability: a reward model's score s counts as sigmoid(s - midpoint), with the midpoint of the
    ``calibration.json`` beside its weights; raw: as s.

    A call of the function or a server that raises, takes longer than ``timeout_s`` or returns what is no score ends
    the run (``on_error: fail``), or the component is ``penalty`` and the answers are counted (``on_error: penalty``).

    ``shuffle`` hands the rewards of a step to random answers: a control in which nothing can be learnt.
    """

    models: dict[ComponentName, str] = {}
    servers: dict[ComponentName, Annotated[str, Field(pattern=r"^https?://.+")]] = {}
    weights: dict[str, FiniteFloat] = {}
    model_scale: Literal["probability", "raw"] = "probability"
    timeout_s: PositiveFloat = 10.0
    on_error: Literal["fail", "penalty"] = "fail"
    penalty: FiniteFloat = 0.0
    concurrency: PositiveInt | None = None  # calls at a time; None: 4 in threads, 64 of an `async def` or to a server
    shuffle: bool = False

    @model_validator(mode="after")
    def _check_names(self) -> Reward:
        known = ["function", *self.models, *self.servers]
        for name in known:
            if known.count(name) > 1:
                raise ValueError(f"reward: two components are called {name!r}; `function` is the recipe's")
        for name in self.weights:
            if name not in known:
                raise ValueError(f"reward.weights names {name!r}; the components are {', '.join(known)}")
        return self

    def weight(self, component: str) -> float:
        return self.weights.get(component, 1.0)

    @property
    def needs_function(self) -> bool:
        """There is nobody else to judge."""
        return not (self.models or self.servers)

    @property
    def model_roles(self) -> dict[str, str]:
        """Names of the reward models' roles, by component."""
        return {name: "reward_model" if len(self.models) == 1 else f"reward_model-{name}" for name in self.models}


class Rollout(Section):
    """``top_k`` (0: all), ``top_p`` and ``min_p`` truncate what is sampled from, and the algorithm corrects for it."""

    prompts_per_step: PositiveInt
    samples_per_prompt: PositiveInt
    max_tokens: PositiveInt
    temperature: Temperature = 1.0
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    kv_cache_gib: PositiveFloat = 1.0
    page_size: PositiveInt = 32
    max_num_seqs: PositiveInt = 512
    max_batch_tokens: PositiveInt = 4096
    numerics: Literal["auto", "exact", "fast"] = "auto"  # auto: exact for float32 on a CPU

    @property
    def truncates(self) -> bool:
        """Tokens are drawn from a part of the vocabulary."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class Train(Section):
    """``zero_stage`` 0 and 1 mean 2 for bf16 weights, which need fp32 masters, and sums of their gradients in fp32."""

    lr: NonNegativeFloat
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: PositiveFloat = 1.0
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    zero_stage: Literal[0, 1, 2, 3] = 0
    tokens_per_microbatch: PositiveInt = 8192

    def stage(self, *, bf16: bool) -> int:
        return max(2, self.zero_stage) if bf16 else self.zero_stage


FROZEN_KEYS = ("dtype", "zero_stage", "tokens_per_microbatch", "ranks")  # that a role which doesn't learn reads


class RoleSection(Section):
    """What a role has otherwise than the policy: keys of ``model`` and ``train``, and ``ranks``. ``path`` None: the
    weights that the policy starts from. Reference and reward models don't learn: ``zero_stage`` 3 divides their weights
    among their ranks, for models that are larger than a device; otherwise each rank has them all."""

    path: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    gradient_checkpointing: bool | None = None
    lr: NonNegativeFloat | None = None
    warmup_steps: NonNegativeInt | None = None
    schedule: Literal["constant", "linear", "cosine"] | None = None
    max_grad_norm: PositiveFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    betas: tuple[Beta, Beta] | None = None
    zero_stage: Literal[0, 1, 2, 3] | None = None
    tokens_per_microbatch: PositiveInt | None = None
    ranks: PositiveInt | None = None


class Cluster(Section):
    """``threads`` per worker; ``gpus`` of the run; ``ranks`` of the policy (:attr:`Config.ranks` has the others');
    ``placement``: rank r of every role on the same device, taking turns, or every rank on a device of its own, and what
    roles can do at the same time they do; ``timeout_s`` bounds every call to a role."""

    kind: Literal["local", "ray"] = "local"
    gpus: NonNegativeInt = 0
    ranks: PositiveInt | None = None
    placement: Literal["colocated", "separate"] = "colocated"
    threads: PositiveInt = 2
    timeout_s: PositiveFloat = 1800
    start_timeout_s: PositiveFloat = 300


class Eval(Section):
    every: NonNegativeInt = 20  # 0: only before and after
    prompts: PositiveInt = 256
    samples: PositiveInt = 1
    temperature: Literal[0] | Temperature = 0


class Checkpoint(Section):
    """A run whose role died or hung goes on by itself from its last checkpoint, ``max_restarts`` times at most."""

    every: NonNegativeInt = 0  # 0: only at the end
    keep_last: PositiveInt = 2
    keep_best: Literal["eval/accuracy", "eval/reward"] | None = "eval/accuracy"  # stays while it is the largest
    max_restarts: NonNegativeInt = 3


class Tracking(Section):
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online with a key, else offline
    project: str = "onpolicy"
    samples_per_step: NonNegativeInt = 16


class Config(Section):
    run: Run
    model: ModelSection = ModelSection()
    recipe: RecipeSection
    data: Data = Data()
    warm_start: WarmStart = WarmStart()
    reward: Reward = Reward()
    rollout: Rollout
    algorithm: dict[str, Any]
    train: Train
    critic: RoleSection = RoleSection()
    reference: RoleSection = RoleSection()
    reward_model: RoleSection = RoleSection()
    cluster: Cluster = Cluster()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _check_role_keys(self) -> Config:
        for role in ("critic", "reference", "reward_model"):
            for key, value in self.section_of(role):
                if value is not None and (reason := self._no_use(role, key, value)):
                    raise ValueError(f"{role}.{key}={value!r}: {reason}")
        return self

    def _no_use(self, role: str, key: str, value: Any) -> str | None:
        """Why a role has none for a key of its section; None: it has."""
        if role == "reward_model" and key == "path":
            return "reward models are named in reward.models, such as reward.models={helpful: CHECKPOINT}"
        if role == "reward_model" and not self.reward.models:
            return "there is no reward model; name one in reward.models, or leave this out"
        if role != "reward_model" and role not in self.make_algorithm().roles:
            why = "with kl_coef=0 measures no KL to a" if role == "reference" else "has no"
            return f"algorithm.name={self.algorithm['name']} {why} {role}; leave this out, or change the algorithm"
        if role != "critic" and key not in (*FROZEN_KEYS, "path", "revision"):
            return f"the role doesn't learn; of these keys it has a use for {', '.join(FROZEN_KEYS)} alone"
        if role != "critic" and key == "zero_stage" and value not in (0, 3):
            return "stages 1 and 2 divide an optimizer, and the role has none; set 0, or 3, which divides its weights"
        if role != "reward_model" and key == "revision" and self.section_of(role).path is None:
            return f"there is no {role}.path; the weights are the policy's, whose revision is model.revision"
        return None

    def section_of(self, role: str) -> RoleSection:
        """Of any model role but the policy; all reward models have one."""
        section: RoleSection = getattr(self, role.partition("-")[0])
        return section

    def of_role(self, role: str) -> tuple[ModelSection, Train, int]:
        """Model, training and number of ranks of ``policy``, ``critic``, ``reference`` or a reward model (see
        ``Reward.model_roles``); where its section says nothing, the policy's, but for ``model.path``, then None."""
        if role == "policy":
            return self.model, self.train, self.ranks["policy"]
        section = self.section_of(role)
        own = {key: value for key, value in section.model_dump().items() if value is not None}
        model = self.model.model_copy(update={key: own[key] for key in own if key in ModelSection.model_fields})
        train = self.train.model_copy(update={key: own[key] for key in own if key in Train.model_fields})
        return model.model_copy(update={"path": section.path}), train, self.ranks[role]

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of every model role: the policy and whom its algorithm asks for.

        Colocated, a role has as many as the policy, and that has one per GPU, where nothing else is said. Separate,
        each has one, and the policy the GPUs that the others leave.
        """
        roles = (*self.make_algorithm().roles, *self.reward.model_roles.values())
        others = {role: self.section_of(role).ranks for role in roles}
        if self.cluster.placement == "separate":
            own = {role: ranks or 1 for role, ranks in others.items()}
            return {"policy": self.cluster.ranks or max(1, self.cluster.gpus - sum(own.values())), **own}
        policy = self.cluster.ranks or max(1, self.cluster.gpus)
        return {"policy": policy, **{role: ranks or policy for role, ranks in others.items()}}

    def make_algorithm(self) -> algorithms.Algorithm:
        """The algorithm with its hyper-parameters. Raises ValueError for an unknown one or a bad value."""
        try:
            return algorithms.load(self.algorithm)
        except ValidationError as error:
            raise ValueError(
                _explain(error, type(algorithms.load({"name": self.algorithm["name"]})), "algorithm.")
            ) from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply ``section.key=value`` overrides.

    Raises ValueError that names the key, what was given, what is allowed and, for an unknown key, the nearest one.
    """
    return parse_config(read_tree(path, overrides))


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML config with its overrides, unchecked. Raises ValueError for what is no mapping of sections."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no config file {str(path)!r}; `rlhf init NAME > {file.name}` writes a packaged one")
    tree = _yaml(file.read_text(), str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is not a mapping of sections (run, model, recipe, ...)")
    for override in overrides:
        key, equals, value = override.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and name):
            raise ValueError(f"override {override!r} is not of the form section.key=value, such as train.lr=2e-6")
        tree[section] = {**(tree.get(section) or {}), name: _yaml(value, f"override {override!r}")}
    return tree


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {' '.join(str(error).split())}") from None


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate a config tree. Raises ValueError, see :func:`load_config`."""
    config = validated(Config, tree)
    return config.model_copy(update={"algorithm": asdict(config.make_algorithm())})  # type: ignore[call-overload]


def validated(root: type[Root], tree: dict[str, Any]) -> Root:
    """A config tree as its class. Raises ValueError, see :func:`load_config`."""
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        raise ValueError(_explain(error, root)) from None


def dump_config(config: Section) -> str:
    """The config as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def spell(value: Any) -> str:
    """A plain value as a config or an override spells it: null, true, 0.2, group."""
    return yaml.safe_dump([value], default_flow_style=True).strip()[1:-1]


def _explain(error: ValidationError, root: Any, prefix: str = "") -> str:
    lines = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        key = prefix + ".".join(path)
        if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = _fields(root, path[:-1])
            near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0)
            meant = prefix + ".".join([*path[:-1], *near])
            lines.append(f"unknown key {key!r}; did you mean {meant!r}? Known: {', '.join(known)}")
        elif not path or problem["type"] == "value_error":  # what a section says of itself names its keys
            lines.append(problem["msg"].removeprefix("Value error, "))
        elif problem["type"] == "missing":
            lines.append(f"{key} is missing and has no default")
        else:
            lines.append(f"{key}={problem['input']!r}: {problem['msg']}")
    return "; ".join(lines)


def _fields(root: Any, path: list[str]) -> list[str]:
    if path:
        root = root.model_fields[path[0]].annotation
    return list(root.model_fields if hasattr(root, "model_fields") else root.__dataclass_fields__)
