"""train.py with accelerate's FSDP on a CPU, where accelerate leaves it out; for test_train.py.

ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_AUTO_WRAP_POLICY=NO_WRAP torchrun … tests/fsdp_on_cpu.py …
"""

import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import scan_kernels
import train

begin = AcceleratorState.__init__


def begin_with_fsdp(self, *args, fsdp_plugin=None, **options):
    begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
    self.distributed_type = DistributedType.FSDP
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = begin_with_fsdp
scan_kernels.KERNELS = {}  # FSDP takes a weight's memory away, which it cannot where NumPy looks at it

if __name__ == "__main__":
    train.main()
