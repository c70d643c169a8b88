"""Layouts of checkpoints, one file for each family. The first format that claims a file or folder reads it."""

from phasewatch.monitor.snapshots.formats.base import Entry as Entry
from phasewatch.monitor.snapshots.formats.base import Format as Format
from phasewatch.monitor.snapshots.formats.deepspeed import DeepSpeedFolder
from phasewatch.monitor.snapshots.formats.distributed import DistributedFolder, DistributedSafetensors
from phasewatch.monitor.snapshots.formats.hugging_face import FolderOfOneFile, HuggingFaceFolder
from phasewatch.monitor.snapshots.formats.megatron import MegatronDistributed, MegatronRank
from phasewatch.monitor.snapshots.formats.safetensors import SafetensorsFile
from phasewatch.monitor.snapshots.formats.torch_files import TorchFile

FORMATS: tuple[Format, ...] = (
    SafetensorsFile(),
    TorchFile(),
    HuggingFaceFolder(),
    DeepSpeedFolder(),
    MegatronDistributed(),
    MegatronRank(),
    DistributedFolder(),
    DistributedSafetensors(),
    FolderOfOneFile(),
)
"""All formats, in the order in which they are asked. A new one is a file here and a line in this table."""
