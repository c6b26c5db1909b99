"""Models of the size of those in public reports of slow machines, for docs/why-slower.md.

    lightning-powersgd plan examples/reported_models.py:ecapa_tdnn --link 625mbit --world-size 6

They have the parameters of the originals, written down from their published settings, and no forward pass: the planner
asks for shapes alone.
"""

from __future__ import annotations

from torch import nn


def coca_vit_l_14() -> nn.Module:
    """CoCa with ViT-L/14, as open_clip's ``coca_ViT-L-14`` has it: 638 million parameters."""
    image = nn.ModuleList(
        [nn.Conv2d(3, 1024, 14, bias=False), *_blocks(24, 1024), nn.Embedding(257, 1024), nn.Embedding(256, 768)]
    )
    pool = nn.MultiheadAttention(768, 8, kdim=1024, vdim=1024)
    text = nn.ModuleList([nn.Embedding(49408, 768), nn.Embedding(77, 768), *_blocks(12, 768)])
    captions = nn.ModuleList([*_blocks(12, 768), *_blocks(12, 768), nn.Linear(768, 49408, bias=False)])
    projections = nn.ModuleList(nn.Linear(768, 768, bias=False) for _ in range(2))
    return nn.ModuleList([image, pool, text, captions, projections])


def ecapa_tdnn(speakers: int = 7205) -> nn.Module:
    """ECAPA-TDNN with 1024 channels and a classifier, as SpeechBrain's VoxCeleb recipe has it: 22 million parameters.

    Args:
        speakers: to tell apart; of VoxCeleb 1 and 2 together by default.
    """
    layers: list[nn.Module] = [nn.Conv1d(80, 1024, 5), nn.BatchNorm1d(1024)]
    for _ in range(3):
        layers += [nn.Conv1d(1024, 1024, 1), nn.BatchNorm1d(1024), nn.Conv1d(1024, 1024, 1), nn.BatchNorm1d(1024)]
        layers += [layer for _ in range(7) for layer in (nn.Conv1d(128, 128, 3), nn.BatchNorm1d(128))]
        layers += [nn.Conv1d(1024, 128, 1), nn.Conv1d(128, 1024, 1)]
    layers += [nn.Conv1d(3072, 3072, 1), nn.BatchNorm1d(3072), nn.Conv1d(9216, 128, 1), nn.BatchNorm1d(128)]
    layers += [nn.Conv1d(128, 3072, 1), nn.BatchNorm1d(6144), nn.Conv1d(6144, 192, 1)]
    return nn.ModuleList([*layers, nn.Linear(192, speakers, bias=False)])


def transformer_iwslt() -> nn.Module:
    """A translator, as fairseq's ``transformer_iwslt_de_en`` with a shared output table: 39 million parameters."""
    encoder = nn.ModuleList(nn.TransformerEncoderLayer(512, 4, 1024) for _ in range(6))
    decoder = nn.ModuleList(nn.TransformerDecoderLayer(512, 4, 1024) for _ in range(6))
    return nn.ModuleList([nn.Embedding(8848, 512), nn.Embedding(6632, 512), encoder, decoder])


def convnext_base() -> nn.Module:
    """ConvNeXt-Base with the 1,000 classes of ImageNet: 89 million parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 128, 4)]
    for d, blocks in ((128, 3), (256, 3), (512, 27), (1024, 3)):
        layers += [nn.Conv2d(d // 2, d, 2)] if d > 128 else []
        for _ in range(blocks):
            layers += [nn.Conv2d(d, d, 7, groups=d), nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)]
    return nn.ModuleList([*layers, nn.LayerNorm(1024), nn.Linear(1024, 1000)])


def _blocks(count: int, d: int) -> list[nn.Module]:
    """Transformer blocks with heads of 64 and a feed-forward layer of four times the width."""
    return [nn.TransformerEncoderLayer(d, d // 64, 4 * d) for _ in range(count)]
