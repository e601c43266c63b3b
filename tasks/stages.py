"""The stages of all methods, each declared once, in the order in which they run.

What depends on the list of stages reads it here: the settings of an experiment, statuses, forms,
deployments, `prefect.yaml`, `staple stage --help`, figures and the report. `flows.em: steps` calls
the stages' functions. No stage imports this module, so that a change here makes none stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from models.settings import Settings, is_settings
from models.training.adapter import TrainingStep
from tasks import rows
from tasks.cluster import ClusterSettings
from tasks.evaluate import EvaluateSettings
from tasks.filter import FilterSettings
from tasks.judging.gate import GatePoint
from tasks.mine import MineSettings
from tasks.prompts import PromptSettings
from tasks.review import ReviewSettings
from tasks.sami.evaluate import Estimate
from tasks.sami.sample import SampleSettings
from tasks.sami.write import WriteSettings
from tasks.score import ScoreSettings
from tasks.teach import TeachSettings
from tasks.train import TrainSettings

Part = Literal["every method", "E-step", "constitution", "given constitution"]
"""The part of the loop that a stage belongs to; a method has some of them."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the rest of the project has to know about a stage."""

    about: str
    """What it makes, in a few words."""
    reads: tuple[str, ...] = ()
    """The stages whose outputs it can read, of this iteration or an earlier one."""
    writes: Mapping[str, type[Any]] = field(default_factory=dict)
    """The tables that it can write: name → type of a row. Benchmarks add their own."""
    publishes: tuple[str, ...] = ()
    """Other outputs, which the iteration's own MLflow run shows too."""
    tells: Mapping[str, str] = field(default_factory=dict)
    """Figure → how its line says it when the stage is finished; the first that was measured."""
    part: Part = "every method"
    iterations: Literal["every", "first", "later"] = "later"
    """ "first" is iteration 0, the initial policy's."""
    pool: Literal["cpu", "gpu"] = "cpu"
    """Prefect's work pool: "gpu" for what uses a model."""
    deployed: bool = True
    """Whether Prefect's UI can run it by itself."""
    colour: str
    hatch: str = ""
    """matplotlib's hatch: colour is not the only sign that tells stages apart."""

    def runs_in(self, iteration: int) -> bool:
        """Whether an iteration can have it."""
        return self.iterations == "every" or (self.iterations == "later") == (iteration > 0)


BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


class StageSettings(Settings):
    """The settings of every stage, beside its declaration."""

    prompts: Annotated[
        PromptSettings,
        Stage(
            about="the prompts that an iteration mines or holds out",
            tells={"prompts": "{:,.0f} prompts"},
            writes={"prompts": rows.Prompt, "rejected": rows.Rejected},
            iterations="every",
            colour="#999999",
            hatch="||",
        ),
    ] = PromptSettings()
    """Where prompts and gold responses come from, and how many each iteration takes."""
    teach: Annotated[
        TeachSettings,
        Stage(
            about="naming and following, taught on other rules",
            tells={"teach/lessons": "{:,.0f} examples"},
            writes={"curve": TrainingStep, "skipped": rows.Rejected},
            publishes=("adapter",),
            iterations="first",
            pool="gpu",
            colour="#7F5AA2",
            hatch="..",
        ),
    ] = TeachSettings()
    """Whether the policy is taught the method's two skills first."""
    write: Annotated[
        WriteSettings,
        Stage(
            about="the principles and antitheses to be taught",
            tells={"write/principles": "{:,.0f} principles"},
            reads=("teach", "cluster", "review"),
            writes={"rejected": rows.Rejected},
            publishes=("constitution.yaml",),
            part="given constitution",
            iterations="first",
            pool="gpu",
            colour=GREEN,
            hatch="\\\\",
        ),
    ] = WriteSettings()
    """SAMI: the constitution, given or written by a model."""
    mine: Annotated[
        MineSettings,
        Stage(
            about="first answers, principles and refined answers",
            tells={"mined_candidates": "{:,.0f} candidates", "mined_prompts": "{:,.0f} prompts"},
            reads=("prompts", "teach", "train"),
            writes={"mined": rows.Mined},
            part="E-step",
            pool="gpu",
            colour=BLUE,
        ),
    ] = MineSettings()
    """E-step: proposals."""
    score: Annotated[
        ScoreSettings,
        Stage(
            about="similarity to the gold responses",
            tells={"candidate_similarity": "similarity {:.2f}"},
            reads=("mine",),
            writes={"scored": rows.Scores},
            part="E-step",
            colour="#56B4E9",
            hatch="//",
        ),
    ] = ScoreSettings()
    """E-step: similarity to the gold response."""
    filter: Annotated[
        FilterSettings,
        Stage(
            about="the refinements that are kept, and why the others are not",
            tells={"trajectories": "{:,.0f} kept"},
            reads=("mine", "score"),
            writes={"trajectories": rows.Trajectory, "rejected": rows.Rejected},
            part="E-step",
            colour="#E69F00",
            hatch="--",
        ),
    ] = FilterSettings()
    """E-step: which proposals are kept."""
    cluster: Annotated[
        ClusterSettings,
        Stage(
            about="the constitution; what is trained on it becomes stale",
            tells={"constitution_size": "{:,.0f} principles"},
            reads=("filter", "mine", "teach", "train", "cluster", "review"),
            writes={"labelled": rows.Labelled, "clusters": rows.ClusterRow},
            publishes=("constitution.yaml", "map.png"),
            part="constitution",
            colour=GREEN,
            hatch="\\\\",
        ),
    ] = ClusterSettings()
    """Posterior regularisation: the constitution."""
    review: Annotated[
        ReviewSettings,
        Stage(
            about="the constitution as a person approved it",
            tells={"constitution_size": "{:,.0f} principles"},
            reads=("cluster",),
            writes={
                "labelled": rows.Labelled,
                "clusters": rows.ClusterRow,
                "rejected": rows.Rejected,
            },
            publishes=("constitution.yaml",),
            part="constitution",
            deployed=False,  # the run of the experiment asks
            colour="#F0E442",
            hatch="++",
        ),
    ] = ReviewSettings()
    """Whether a person approves the constitution before it is trained on."""
    sample: Annotated[
        SampleSettings,
        Stage(
            about="responses under constitutions",
            tells={"sampled_responses": "{:,.0f} responses"},
            reads=("prompts", "teach", "write", "train"),
            writes={"sampled": rows.Sampled},
            part="given constitution",
            pool="gpu",
            colour=BLUE,
        ),
    ] = SampleSettings()
    """SAMI: responses under constitutions."""
    train: Annotated[
        TrainSettings,
        Stage(
            about="the adapter",
            tells={"train/steps": "{:,.0f} steps"},
            reads=("prompts", "teach", "mine", "filter", "cluster", "review", "sample", "train"),
            writes={"curve": TrainingStep, "skipped": rows.Rejected},
            publishes=("adapter",),
            pool="gpu",
            colour=ORANGE,
        ),
    ] = TrainSettings()
    """M-step, or SAMI's objective: the adapter."""
    evaluate: Annotated[
        EvaluateSettings,
        Stage(
            about="held-out answers and win rates",
            tells={
                "win_rate/constitution_vs_0": "win rate {:.2f}",
                "win_rate/refined_vs_initial_0": "win rate {:.2f}",
                "win_rate/initial_vs_0": "win rate {:.2f}",
            },
            reads=("prompts", "teach", "train", "evaluate", "mine", "cluster", "review", "write"),
            writes={
                "answers": rows.Answer,
                "responses": rows.Response,
                "information": Estimate,
                "comparisons": rows.Comparison,
                "gate": GatePoint,
                "plain-comparisons": rows.Comparison,
                "principle-comparisons": rows.Comparison,
            },
            iterations="every",
            pool="gpu",
            colour="#CC79A7",
            hatch="xx",
        ),
    ] = EvaluateSettings()
    """Held-out win rates."""


STAGES: Mapping[str, Stage] = {
    name: declared
    for name, setting in StageSettings.model_fields.items()
    for declared in setting.metadata
    if isinstance(declared, Stage)
}
"""Name → declaration, in the order in which the stages run."""


def settings_of(stage: str) -> type[Settings]:
    """The class of a stage's settings."""
    found = StageSettings.model_fields[stage].annotation
    assert is_settings(found)
    return found
