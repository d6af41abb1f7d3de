"Data sets of images, in memory"
from functools import cache

import numpy as np, torch
from filelock import FileLock
from PIL import Image
from fastai.basics import get_image_files, untar_data

from common import here


def read(folder):
    "Pixels and classes, which are the names of folders; kept in build/ for the next benchmark, since 60,000 files take half a minute"
    kept = here.parent/'build'/f'{folder.parent.name}-{folder.name}.pt'
    kept.parent.mkdir(exist_ok=True)
    with FileLock(f'{kept}.lock'):  # two processes need it at the same time
        if not kept.exists():
            files = get_image_files(folder)
            classes = sorted({f.parent.name for f in files})
            part = kept.with_suffix('.part')
            torch.save((torch.stack([torch.from_numpy(np.array(Image.open(f))) for f in files]), torch.tensor([classes.index(f.parent.name) for f in files])), part)
            part.replace(kept)
    return torch.load(kept)


class Images:
    "A data set of images in memory, and their labels by the names of their folders"
    def __init__(self, folder):
        x,self.y = read(folder)
        x = (x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2)).float()
        dims = 0, 2, 3
        self.x = ((x - x.mean(dims, keepdim=True))/x.std(dims, keepdim=True)).contiguous()
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i],self.y[i]
    def batch(self, idxs): return self.x[idxs],self.y[idxs]


@cache
def images(url, part): return Images(untar_data(url)/part)
