"""Raw attention against the weights computed by hand, however a transformer computes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts import demo
from captum_concepts.activations import attention_maps
from captum_concepts.errors import InputError, LayerError


class Block(nn.Module):
    """One attention over CLS and patches, in three spellings."""

    def __init__(self, how: str, prefix: int) -> None:
        super().__init__()
        self.how, self.prefix = how, prefix
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, prefix, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def tokens(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)

    def projected(self, tokens: Tensor) -> tuple[Tensor, ...]:
        both = F.linear(tokens, self.attention.in_proj_weight, self.attention.in_proj_bias).chunk(3, 2)
        return tuple(part.unflatten(2, (2, 4)).transpose(1, 2) for part in both)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x)
        if self.how == "module":
            return self.attention(tokens, tokens, tokens, need_weights=False)[0][:, 0]
        q, k, v = self.projected(tokens)
        if self.how == "fused":
            return F.scaled_dot_product_attention(q, k, v).mean((1, 2))
        return ((q @ k.transpose(2, 3) / 2).softmax(-1) @ v).mean((1, 2))


@pytest.mark.parametrize("how", ["module", "fused", "softmax"])
@pytest.mark.parametrize("prefix", [0, 1])
def test_equals_the_weights_by_hand(how, prefix):
    torch.manual_seed(0)
    net, x = Block(how, prefix).train(), torch.rand(3, 3, 16, 24)
    q, k, _ = net.projected(net.tokens(x))
    expected = torch.zeros(3, 2, 4, 6)
    for n in range(3):
        for head in range(2):
            weights = torch.stack([torch.stack([(a * b).sum() / 2 for b in k[n, head]]).softmax(0) for a in q[n, head]])
            row = weights[0] if prefix else weights.mean(0)
            expected[n, head] = row[prefix:].view(4, 6)
    torch.testing.assert_close(attention_maps(net, x, prefix_tokens=prefix), expected.detach())
    assert net.training
    assert torch.backends.mha.get_fastpath_enabled()


def test_blocks_in_the_order_in_which_they_run():
    model, x = demo.load("vit"), torch.rand(2, 3, 64, 64)
    last = attention_maps(model, x)
    assert torch.equal(last, attention_maps(model, x, block=3))
    assert not torch.allclose(last, attention_maps(model, x, block=0))
    assert bool((last.sum((2, 3)) <= 1).all())
    torch.testing.assert_close(last[:1], attention_maps(model, x[:1]))
    with pytest.raises(LayerError, match="block=4, but 4 attention blocks ran"):
        attention_maps(model, x, block=4)


def test_whole_blocks_in_one_kernel():
    """`nn.TransformerEncoderLayer` has a fast path under `no_grad` that shows nothing."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.layer = nn.Conv2d(3, 8, 4, stride=4), layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.patch(x).flatten(2).transpose(1, 2)).mean(1)

    net, x = Net().eval(), torch.rand(2, 3, 16, 16)
    tokens = net.patch(x).flatten(2).transpose(1, 2)
    _, weights = layer.self_attn(tokens, tokens, tokens, average_attn_weights=False)
    torch.testing.assert_close(attention_maps(net, x, prefix_tokens=0), weights.mean(2).unflatten(2, (4, 4)).detach())


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_transformers_of_the_libraries(library):
    torch.manual_seed(0)
    if library == "torchvision":
        from torchvision.models import VisionTransformer

        net = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=16).eval()
    else:
        timm = pytest.importorskip("timm")
        net = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=16, num_heads=2)
    assert attention_maps(net, torch.rand(2, 3, 32, 32)).shape == (2, 2, 4, 4)


def test_networks_without_attention_are_refused():
    with pytest.raises(LayerError, match="for vision transformers"):
        attention_maps(demo.load("classifier"), torch.rand(1, 3, 64, 64))
    with pytest.raises(InputError, match="prefix_tokens must be 0 or more"):
        attention_maps(demo.load("vit"), torch.rand(1, 3, 64, 64), prefix_tokens="1")


def test_attention_within_windows_is_not_that_of_an_image():
    class Windows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            cells = nn.functional.unfold(x, 4, stride=4).transpose(1, 2).reshape(len(x) * 4, 1, 4, -1)  # four windows
            return (cells @ cells.transpose(2, 3)).softmax(-1).mean((1, 2, 3)).view(len(x), -1)

    with pytest.raises(LayerError, match="over all tokens of an image"):
        attention_maps(Windows(), torch.rand(2, 3, 16, 16))
