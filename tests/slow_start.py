"""train.py whose looking at the pictures takes longer than PyTorch waits for a process; for test_train.py."""

import sys
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import distributed_c10d

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train

distributed_c10d.default_pg_timeout = timedelta(seconds=3)
precompute = train.precompute


def precompute_slowly(*args):
    time.sleep(5)
    return precompute(*args)


train.precompute = precompute_slowly

if __name__ == "__main__":
    train.main()
