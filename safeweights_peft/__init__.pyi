from .api import enhance as enhance
from .api import evaluate as evaluate
from .api import repair as repair
from .api import score as score
from .api import sweep as sweep
from .api import train as train
from .delta import SparseDelta as SparseDelta
from .errors import (
    AlreadyMergedError as AlreadyMergedError,
)
from .errors import (
    BaseMismatchError as BaseMismatchError,
)
from .errors import (
    CheckpointError as CheckpointError,
)
from .errors import (
    CorruptAdapterError as CorruptAdapterError,
)
from .errors import (
    DataError as DataError,
)
from .errors import (
    EvaluationError as EvaluationError,
)
from .errors import (
    FormatError as FormatError,
)
from .errors import (
    HubError as HubError,
)
from .errors import (
    MergeError as MergeError,
)
from .errors import (
    ModelError as ModelError,
)
from .errors import (
    ReportError as ReportError,
)
from .errors import (
    SafeWeightsError as SafeWeightsError,
)
from .errors import (
    SafeWeightsWarning as SafeWeightsWarning,
)
from .errors import (
    SelectionError as SelectionError,
)
from .errors import (
    SettingsError as SettingsError,
)
from .errors import (
    SignatureError as SignatureError,
)
from .errors import (
    TrainingError as TrainingError,
)
from .errors import (
    UnsupportedFeatureError as UnsupportedFeatureError,
)
from .errors import (
    UnsupportedVersionError as UnsupportedVersionError,
)
from .evaluation.judges import Judge as Judge
from .evaluation.judges import Verdict as Verdict
from .hub.pull import find_on_hub as find_on_hub
from .hub.pull import pull_from_hub as pull_from_hub
from .hub.push import push_to_hub as push_to_hub
from .jobs.anchor import collect_anchor as collect_anchor
from .jobs.load import load_model as load_model
from .merging.convert import convert as convert
from .merging.in_place import merge_in_place as merge_in_place
from .merging.in_place import unmerge as unmerge
from .merging.merge import merge as merge
from .merging.protect import protect as protect
from .merging.verify import verify as verify
from .patch.artifacts import Adapter as Adapter
from .patch.artifacts import SafetyMap as SafetyMap
from .patch.io import (
    inspect as inspect,
)
from .patch.io import (
    read_adapter as read_adapter,
)
from .patch.io import (
    read_map as read_map,
)
from .patch.io import (
    validate as validate,
)
from .patch.io import (
    write_adapter as write_adapter,
)
from .patch.io import (
    write_map as write_map,
)
from .progress import (
    LineProgress as LineProgress,
)
from .progress import (
    Progress as Progress,
)
from .progress import (
    RichProgress as RichProgress,
)
from .settings import (
    ComputeSettings as ComputeSettings,
)
from .settings import (
    EvaluateSettings as EvaluateSettings,
)
from .settings import (
    RunSettings as RunSettings,
)
from .settings import (
    ScoreSettings as ScoreSettings,
)
from .settings import (
    TrainSettings as TrainSettings,
)
from .signing import sign as sign
from .signing import verify_signature as verify_signature
from .training.anchor import Anchor as Anchor
from .training.preserve import (
    SafetyPreservingCallback as SafetyPreservingCallback,
)
from .training.preserve import (
    preserve as preserve,
)
from .tuner.adapter import create_adapter as create_adapter
from .tuner.adapter import round_values as round_values
from .tuner.config import SafeWeightsConfig as SafeWeightsConfig
from .tuner.selfcheck import check_adapter as check_adapter
