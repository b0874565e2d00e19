"""SALFCBM under torch.compile, torch.export and DistributedDataParallel."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from salf_networks import CONCEPTS, ConvNet, conv_model, pictures, token_model
from several import ending_at_once
from torch.nn.parallel import DistributedDataParallel

from captum_concepts.activations import capture
from captum_concepts.models.salf_cbm import SALFCBM

MODELS = {
    "convolutions": (conv_model, (32, 24)),
    "layer inside": (lambda: conv_model("stem.0"), (32, 24)),
    "tokens with CLS": (lambda: token_model(cls_token=True), (16, 16)),
    "tokens first": (lambda: token_model(False), (16, 16)),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, size = MODELS[request.param]
    torch.compiler.reset()
    return make(), pictures(3, *size)


def test_compiled_as_one_graph_without_recompiling(case):
    model, x = case
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for seed in range(3):
        x = pictures(3, *x.shape[-2:], seed=seed)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == 1
    assert not any(m._forward_hooks for m in model.modules())


def test_compiled_gradients(case):
    model, x = case
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model(x).square().sum().backward()
    expected = model.bottleneck.weight.grad.clone()
    model.bottleneck.weight.grad = None
    compiled(x).square().sum().backward()
    torch.testing.assert_close(model.bottleneck.weight.grad, expected, rtol=1e-4, atol=1e-5)


def test_explanations_of_a_compiled_model(case):
    model, x = case
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled.explain(x).scores, model.explain(x).scores)


def test_exported_with_any_batch(case):
    model, x = case
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)
    torch.testing.assert_close(program.module()(x), model(x))
    more = pictures(5, *x.shape[-2:], seed=7)
    torch.testing.assert_close(program.module()(more), model(more))
    assert not any(m._forward_hooks for m in model.modules())


def test_exported_graph_without_what_is_behind_the_layer():
    model = conv_model()
    program = torch.export.export(model, (pictures(),), strict=False)
    used = {node.name for node in program.run_decompositions().graph.nodes if node.users}
    assert not [name for name in used if "backbone_fc" in name]


def test_a_plain_dict_of_hooks_is_mended():
    """What torch 2.6 leaves behind at the layer after a compiled call, on any version of torch."""
    model = conv_model()
    layer, x = model.backbone.get_submodule(model.layer), pictures()
    expected = model(x)
    for call in (model, lambda x: capture(model.backbone, x, [layer])):
        layer._forward_hooks = {}
        call(x)
        assert isinstance(layer._forward_hooks, OrderedDict)
    assert torch.equal(model(x), expected)


def test_compiled_before_any_image_was_seen():
    torch.compiler.reset()
    torch.manual_seed(0)
    model = SALFCBM(ConvNet().eval(), "body", CONCEPTS, 3, feature_dim=8).eval()  # no probe
    logits = torch.compile(model, backend="eager")(pictures())
    torch.testing.assert_close(logits, model(pictures()))


@ending_at_once
def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    try:
        torch.manual_seed(rank)  # DDP takes the parameters of rank 0
        model = SALFCBM(ConvNet().eval(), "body", CONCEPTS, 3, freeze_backbone=False)
        torch.manual_seed(4)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * rank)
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.SGD([p for p in ddp.parameters() if p.requires_grad], lr=0.1)
        x, y = pictures(8), torch.arange(8) % 3
        share = slice(rank * 8 // world, (rank + 1) * 8 // world)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(ddp(x[share]), y[share]).backward()
            optimizer.step()
        save_file({k: v.clone() for k, v in model.state_dict().items()}, f"{folder}/{world}-{rank}.safetensors")
    finally:
        dist.destroy_process_group()


def test_one_and_two_processes_train_the_same_model(tmp_path):
    mp.spawn(worker, args=(1, str(tmp_path)), nprocs=1)
    mp.spawn(worker, args=(2, str(tmp_path)), nprocs=2)
    one, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-5, msg=name)
    torch.manual_seed(4)
    assert one["bottleneck.weight"].isfinite().all()
