"""Four crops of scikit-image's photograph of coins with their masks, as ``coins.npz``: x is 4 x 1 x 64 x 64, y the same."""

import numpy as np
from skimage import data, filters, transform

photograph = data.coins() / 255
mask = photograph > filters.threshold_otsu(photograph)
corners = [(0, 10), (60, 130), (150, 40), (180, 200)]
crops = [(slice(top, top + 110), slice(left, left + 110)) for top, left in corners]
np.savez(
    "coins.npz",
    x=np.stack([transform.resize(photograph[crop], (64, 64), anti_aliasing=True) for crop in crops])[:, None],
    y=np.stack([transform.resize(mask[crop], (64, 64), order=0) for crop in crops])[:, None].astype(np.float32),
)
