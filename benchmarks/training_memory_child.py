"""The process in which `benchmarks.training_memory` measures one side's memory on a CPU; prints the extra bytes."""

import json
import sys

from benchmarks.training_memory import Problem, resident_extra

if __name__ == "__main__":
    print(resident_extra(Problem(**json.loads(sys.argv[1]))))
