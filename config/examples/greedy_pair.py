"""Register a pair with greedy (Yushkevich et al. 2016), of the package picsl_greedy: MOVING FIXED FIELD THREADS.

By its own default greedy rounds its field to tenths of a voxel, which folds in places; `-wp 0` does not round.
"""

import sys

from picsl_greedy import Greedy3D

moving, fixed, field, threads = sys.argv[1:]
Greedy3D().execute(
    f"-V 0 -threads {threads} -d 3 -noise 0 -m NCC 2x2x2 -n 100x50x10 -wp 0 -i {fixed} {moving} -o {field}"
)
