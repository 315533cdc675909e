"""Small nets with a concat, and a defect that leaves the float model as it is."""

import torch
import torch.nn.functional as F
from torch import nn

from mmdet3d_quant.layers import QuantConcat, QuantConv2d, QuantConvTranspose2d


def block(i, o, kernel=3):
    """Convolution, batch norm with statistics that are not the identity, ReLU."""
    norm = nn.BatchNorm2d(o)
    for tensor, low in ((norm.weight, 0.5), (norm.running_var, 0.5), (norm.running_mean, -0.5)):
        nn.init.uniform_(tensor, low, low + 1)
    nn.init.uniform_(norm.bias, -0.2, 0.5)
    conv = QuantConv2d(i, o, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, norm, nn.ReLU(inplace=True))


class Fusion(nn.Module):
    """Two branches, joined; ``between`` is what is done to the first one before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.camera, self.lidar = block(3, 8), block(3, 8)
        self.fuser = QuantConv2d(16, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)
        self.eval()

    def between(self, x):
        return x

    def join(self, a, b):
        return torch.cat([a, b], 1)

    def forward(self, x):
        joined = self.join(self.between(self.camera(x)), self.lidar(x.flip(3)))
        return self.head(self.fuser(joined).relu())


class Resized(Fusion):
    """What may lie between: resizing, padding, pooling, views, before and behind the concat."""

    def between(self, x):
        x = F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=True)
        x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=2)
        return x.unflatten(0, (1, -1)).flatten(0, 1).permute(0, 2, 3, 1).contiguous().movedim(3, 1)

    def join(self, a, b):
        return F.avg_pool2d(torch.cat([a, b], 1), 2).relu_()


class Grid(Fusion):
    """Quantized by the concat; read by a transposed convolution, too, and joined once more."""

    def __init__(self):
        super().__init__()
        self.concat, self.up = QuantConcat(), QuantConvTranspose2d(16, 8, 2, 2)
        self.last = QuantConv2d(11, 8, 1)

    def forward(self, x):
        joined = self.concat([self.camera(x), self.lidar(x.flip(3))])
        rest = torch.cat([x, self.up(joined)[..., ::2, ::2]], 1)
        return self.head(self.fuser(joined) + self.last(rest))


class Twice(Fusion):
    """The concat is joined with a third tensor, before it."""

    def __init__(self):
        super().__init__()
        self.fuser = QuantConv2d(19, 8, 3, padding=1)

    def join(self, a, b):
        joined = torch.cat([a, b], 1)
        return torch.cat([b.new_ones(b.shape[0], 3, *b.shape[2:]), joined], 1)


class Alone(Fusion):
    """The first branch is read by a layer of its own, too, and comes without a batch norm."""

    def __init__(self):
        super().__init__()
        self.camera = nn.Sequential(QuantConv2d(3, 8, 1), nn.LeakyReLU(0.1))
        self.alone = QuantConv2d(8, 2, 1)
        self.eval()

    def forward(self, x):
        camera = self.camera(x)
        return self.head(self.fuser(self.join(camera, self.lidar(x)))) + self.alone(camera)


class Scattered(Fusion):
    """The first branch is written into a map of zeros, as voxels are."""

    def between(self, x):
        dense = torch.zeros(x.shape[0], 4, 4, x.shape[1])
        where = torch.arange(4)
        dense[:, where, where] = x.permute(0, 2, 3, 1)[:, where, where]
        return F.interpolate(dense.permute(0, 3, 1, 2), size=x.shape[2:])


SOUND = [Fusion, Resized, Grid, Twice, Alone, Scattered]


def shrink(model, factor):
    """Makes the first branch smaller by a factor, and the float model computes the same."""
    source = [m for m in model.camera if hasattr(m, 'weight')][-1]
    start = 3 if isinstance(model, Twice) else 0
    parts = [model.fuser.weight[:, start : start + 8]]
    parts += [model.up.weight[:8]] if isinstance(model, Grid) else []
    parts += [model.alone.weight] if isinstance(model, Alone) else []
    with torch.no_grad():
        source.weight.mul_(factor)
        source.bias.mul_(factor)
        for part in parts:
            part.div_(factor)
    return model


def data(count=3):
    """Batches of images."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


class Added(Fusion):
    """The first branch ends in a sum."""

    def between(self, x):
        return x + x.flip(2)


class ReadAgain(Fusion):
    """The first branch is read by a sum, too."""

    def forward(self, x):
        camera = self.camera(x)
        joined = self.fuser(self.join(camera, self.lidar(x)))
        return self.head(joined + camera)


class Returned(Fusion):
    """The first branch is a result, too."""

    def forward(self, x):
        camera = self.camera(x)
        return self.head(self.fuser(self.join(camera, self.lidar(x)))), camera


class Remembered(Fusion):
    """The first branch is kept in the model."""

    def between(self, x):
        self.__dict__['last'] = x
        return x


class Input(Fusion):
    """The first branch is an input of the model."""

    def forward(self, x):
        return self.head(self.fuser(self.join(x.repeat(1, 3, 1, 1)[:, :8] / 100, self.lidar(x))))


class Groups(Fusion):
    """The concat is read by a convolution with groups."""

    def __init__(self):
        super().__init__()
        self.fuser = QuantConv2d(16, 16, 1, groups=16)
        self.head = nn.Conv2d(16, 2, 1)
        self.eval()


class Normed(Fusion):
    """The concat is read by a batch norm, too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(16)
        self.eval()

    def forward(self, x):
        joined = self.join(self.camera(x), self.lidar(x))
        return self.head(self.fuser(joined)) + self.norm(joined)[:, :2]


class Shuffled(Fusion):
    """Channels of the concat are moved."""

    def join(self, a, b):
        return torch.cat([a, b], 1)[:, [*range(8, 16), *range(8)]]


class Tokens(Fusion):
    """The concat is read with its channels at another axis."""

    def join(self, a, b):
        return torch.cat([a, b], 1).transpose(1, 2).reshape(a.shape[0], 16, *a.shape[2:])


class Shared(Fusion):
    """Both branches come from one module."""

    def __init__(self):
        super().__init__()
        self.lidar = self.camera

    def forward(self, x):
        return self.head(self.fuser(self.join(self.camera(x), self.camera(x * 100))))


class Hooked(Fusion):
    """A hook changes what the first branch makes."""

    def __init__(self):
        super().__init__()
        self.camera[1].register_forward_hook(lambda module, x, y: y)


class Elsewhere(Fusion):
    """The first branch is in another concat, too."""

    def __init__(self):
        super().__init__()
        self.other = QuantConv2d(16, 2, 1)
        self.eval()

    def forward(self, x):
        camera, lidar = self.camera(x), self.lidar(x)
        return self.head(self.fuser(self.join(camera, lidar))) + self.other(
            torch.cat([lidar, camera], 1)
        )


class Opaque(nn.Module):
    """Reads a tensor without an operator, as CUDA extensions do."""

    def forward(self, x):
        return torch.from_numpy(x.numpy() + 1)


class Extension(Fusion):
    """The first branch is read by an extension, too."""

    def __init__(self):
        super().__init__()
        self.extension = Opaque()

    def forward(self, x):
        camera = self.camera(x)
        joined = self.fuser(self.join(camera, self.lidar(x)))
        return self.head(joined + self.extension(camera))


class Unseen(Fusion):
    """The same in the forward of the model itself, where it cannot be seen."""

    def forward(self, x):
        camera = self.camera(x)
        other = torch.from_numpy(camera.numpy() + 1)
        return self.head(self.fuser(self.join(camera, self.lidar(x))) + other)


#: Nets whose first branch cannot be scaled, and what the reason says.
REFUSED = {
    Added: 'made by add in Added',
    ReadAgain: 'add in ReadAgain reads it, too',
    Returned: 'relu in camera.2 makes is kept or returned',
    Remembered: 'makes is kept or returned',
    Input: 'made by div in Input',
    Groups: 'fuser, which reads it, has groups',
    Normed: 'norm reads it, too, and no weight takes a factor back',
    Shuffled: 'index in Shuffled may move channels of the concat',
    Tokens: 'reads the concat with other axes',
    Shared: 'camera.1: it runs 2 times in a forward',
    Hooked: 'camera.1: it has forward hooks',
    Elsewhere: 'the concat of Elsewhere reads it, too',
    Extension: 'extension reads it, too',
}
