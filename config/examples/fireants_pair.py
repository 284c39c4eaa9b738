"""Register a pair with FireANTs (Jena et al. 2024), of the package fireants: MOVING FIXED FIELD.

The pairs are affinely aligned, so that it is the deformable part alone.
"""

import sys

import torch
from fireants.io import BatchedImages, Image
from fireants.registration.greedy import GreedyRegistration

device = "cuda" if torch.cuda.is_available() else "cpu"
moving, fixed = (BatchedImages([Image.load_file(path, device=device)]) for path in sys.argv[1:3])
registration = GreedyRegistration(
    scales=[4, 2, 1],
    iterations=[200, 100, 50],
    fixed_images=fixed,
    moving_images=moving,
    loss_type="cc",
    cc_kernel_size=5,
    deformation_type="compositive",
    smooth_grad_sigma=1.0,
    smooth_warp_sigma=0.5,
    optimizer="adam",
    optimizer_lr=0.5,
    progress_bar=False,
)
registration.optimize()
registration.save_as_ants_transforms([sys.argv[3]])
