"""Register a pair with ConvexAdam (Siebert et al. 2021), of the package convexAdam: MOVING FIXED FIELD.

Its field is in voxels, (D, H, W, 3).
"""

import sys

import nibabel as nib
import numpy as np
import torch
from convexAdam.convex_adam_MIND import convex_adam_pt

moving, fixed = (np.asarray(nib.load(path).dataobj, dtype=np.float32) for path in sys.argv[1:3])
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
np.save(sys.argv[3], convex_adam_pt(fixed, moving, dtype=torch.float32, device=device).astype(np.float32))
