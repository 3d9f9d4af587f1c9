"""Defences: what they do to an update, what it costs, and what an attacker who knows them inverts."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradleak import models
from gradleak.client import Average, FedAvg, FedSGD, build_client, defence_costs, operator, simulate
from gradleak.defences import (
    DEFENCES,
    DPSGD,
    Clip,
    Defence,
    Defended,
    Gaussian,
    Laplace,
    Mask,
    PerImage,
    Prune,
    Quantise,
    Sign,
    Soteria,
    UpdateMap,
    available,
    defend,
    distortion,
    parse,
    prepare,
    visible_mask,
)
from gradleak.errors import ModelError, SpecError
from gradleak.observation import Observation, Truth, Update
from gradleak.spec import ClientSpec, DefenceSpec, ModelSpec, dump, load
from gradleak.tensors import read_tensors
from gradleak.vjp import secant

#: Each from no protection to much.
LADDERS: list[list[UpdateMap]] = [
    [Gaussian(sigma=s) for s in (0, 0.1, 0.5, 2)],
    [Laplace(sigma=s) for s in (0, 0.1, 0.5, 2)],
    [Clip(norm=c) for c in (1e6, 0.2, 0.1, 0.01)],
    [Prune(fraction=f) for f in (0, 0.3, 0.7, 0.99)],
    [Quantise(bits=b) for b in (16, 8, 4, 2)],
]
DETERMINISTIC: list[list[Defence]] = [
    [Clip(norm=0.1)],
    [Prune(fraction=0.7)],
    [Sign()],
    [Quantise(bits=4)],
    [Soteria(fraction=0.5)],
    [Clip(norm=0.1), Prune(fraction=0.5), Quantise(bits=8)],
    [Prune(fraction=0.5), Soteria(fraction=0.3), Clip(norm=0.1)],
]


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def opacus() -> Any:
    return pytest.importorskip("opacus", reason="Opacus is not installed: pip install 'gradleak[opacus]'")


def network(norm: type[nn.Module] | None = None, *, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A convolution and a linear layer with 36 features for 3 x 6 x 6 images and 4 classes."""
    torch.manual_seed(0)
    middle = nn.Identity() if norm is None else norm(4)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), middle, nn.Sigmoid(), nn.Flatten(), nn.Linear(36, 4)).to(
        dtype
    )


def batch(images: int = 5, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(images, 3, 6, 6, dtype=dtype, generator=generator), torch.arange(images) % 4


def gradient() -> Update:
    return FedSGD(network())(*batch())


def random_like(update: Update, *, seed: int = 2) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, dtype=t.dtype, generator=generator) for name, t in update.items()}


def inner(a: Update, b: Update) -> float:
    return sum(float((a[name] * b[name]).sum()) for name in a)


def norm(update: Update) -> float:
    return math.sqrt(inner(update, update))


def same(a: Update, b: Update) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def close(found: Update, expected: Update, *, rtol: float = 1e-9, atol: float = 1e-13) -> None:
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: ladder[0].name)
def test_more_protection_is_more_distortion(ladder: list[UpdateMap]) -> None:
    """From (next to) nothing upwards; names and shapes stay."""
    update = gradient()
    costs = [distortion(defence(update), update) for defence in ladder]
    assert costs[0] < 1e-3
    assert costs == sorted(costs)
    assert costs[-1] > 0.5
    assert {name: t.shape for name, t in ladder[-1](update).items()} == {name: t.shape for name, t in update.items()}


@pytest.mark.parametrize("kind", [Gaussian, Laplace])
def test_noise_is_seeded_and_as_large_as_it_says(kind: type[Gaussian] | type[Laplace]) -> None:
    """Equal seeds give equal bytes; sigma is the relative distortion; the mean is the update, at any precision and scale."""
    update = {"a": torch.randn(200, 100, generator=torch.Generator().manual_seed(0)), "b": torch.zeros(50)}
    defence = kind(sigma=0.3)
    sent = defence(update, seed=1)
    assert same(sent, defence(update, seed=1))
    assert not same(sent, defence(update, seed=2))
    assert distortion(sent, update) == pytest.approx(0.3, rel=0.03)
    assert float(sent["b"].std()) == pytest.approx(float((sent["a"] - update["a"]).std()), rel=0.4)
    assert abs(float((sent["a"] - update["a"]).mean())) < 0.01
    close(
        defence({k: 1e-9 * t.double() for k, t in update.items()}, seed=1),
        {k: 1e-9 * t.double() for k, t in sent.items()},
        rtol=1e-5,
    )
    assert defence.expected(update) is update


def test_clipping_keeps_the_direction_and_bounds_the_norm() -> None:
    """A larger update ends on the sphere, a smaller one is not touched."""
    update = gradient()
    clipped = Clip(norm=0.1)(update)
    assert norm(clipped) == pytest.approx(0.1)
    assert inner(clipped, update) == pytest.approx(0.1 * norm(update))
    assert Clip(norm=norm(update) * 1.01)(update) is update


@pytest.mark.parametrize("defence", [Clip(norm=0.1), Clip(norm=1e3), Prune(fraction=0.6)], ids=["clip", "loose", "prune"])
def test_transposes_of_differentiable_defences(defence: UpdateMap) -> None:
    """<D'(g) v, u> = <v, D'(g)^T u>, D'(g) v by central differences."""
    g = gradient()
    u, v, h = random_like(g), random_like(g, seed=3), 1e-7
    ahead, behind = (defence.expected({name: t + step * v[name] for name, t in g.items()}) for step in (h, -h))
    forward = {name: (ahead[name] - behind[name]) / (2 * h) for name in g}
    assert inner(forward, u) == pytest.approx(inner(v, defence.transpose(g, u)), rel=1e-5)


@pytest.mark.parametrize("defence", [Gaussian(sigma=1.0), Laplace(sigma=1.0), Sign(), Quantise(bits=3)], ids=lambda d: d.name)
def test_attackers_go_straight_through_noise_and_rounding(defence: UpdateMap) -> None:
    """The cotangent of the defended client is the plain client's; the update that is compared is the defended one."""
    (x, y), client = batch(), FedSGD(network())
    update, transpose = Defended(client, defence).vjp(x, y)
    u = random_like(update)
    assert torch.equal(transpose(u), client.vjp(x, y)[1](u))
    plain, _ = client.vjp(x, y)
    assert same(update, defence.expected(plain))


def test_pruning_keeps_the_largest_entries_of_each_tensor() -> None:
    """As many as it says, none smaller than one that went, and at least one; zeros stay where they were."""
    update = gradient()
    for fraction in (0.0, 0.25, 0.9, 1.0):
        for name, t in Prune(fraction=fraction)(update).items():
            kept = t != 0
            assert int(kept.sum()) == max(1, t.numel() - math.floor(fraction * t.numel()))
            assert torch.equal(t[kept], update[name][kept])
            assert (~kept).sum() == 0 or update[name][~kept].abs().max() <= t[kept].abs().min()


def test_signs_and_levels() -> None:
    """Sign: one magnitude a tensor, its mean; k bits: at most 2^k - 1 levels, zero among them, the largest entry kept."""
    update = gradient()
    for name, t in Sign()(update).items():
        torch.testing.assert_close(t.abs(), update[name].abs().mean().expand_as(t))
        assert torch.equal(t.sign(), update[name].sign())
    for bits in (2, 4):
        for name, t in Quantise(bits=bits)(update).items():
            step = update[name].abs().max() / (2 ** (bits - 1) - 1)
            assert len(t.unique()) <= 2**bits - 1
            assert (t - update[name]).abs().max() <= step / 2 * (1 + 1e-9)
            torch.testing.assert_close(t.abs().max(), update[name].abs().max())
    zeros = {"a": torch.zeros(3)}
    assert all(same(d(zeros), zeros) for d in (Sign(), Quantise(bits=2), Clip(norm=1.0), Gaussian(sigma=1.0)))


def test_defences_compose_in_their_order() -> None:
    """``defend`` is one map after the other, as client and as attacker; the order matters."""
    (x, y), client = batch(), FedSGD(network())
    clip, prune = Clip(norm=0.1), Prune(fraction=0.8)
    both = defend(client, [clip, prune])
    assert same(both(x, y), prune(clip(client(x, y))))
    assert norm(defend(client, [prune, clip])(x, y)) > norm(both(x, y))
    update, transpose = both.vjp(x, y)
    plain, back = client.vjp(x, y)
    u = random_like(update)
    assert torch.equal(transpose(u), back(clip.transpose(plain, prune.transpose(clip.expected(plain), u))))
    assert [d.name for d in both.defences] == ["clip", "prune"]
    labels = torch.full((5, 4), 0.25, dtype=torch.float64)
    update, joint = both.joint_vjp(x, labels)
    assert same(update, both(x, labels))
    assert [t.shape for t in joint(u)] == [x.shape, labels.shape]


@pytest.mark.parametrize("defences", DETERMINISTIC, ids=lambda d: "+".join(x.name for x in d))
@pytest.mark.parametrize("protocol", ["fedsgd", "fedavg", "average"])
def test_the_attackers_operator_fits_the_truth(defences: list[Defence], protocol: str, tmp_path: Path) -> None:
    """A(x*) is the observed update where nothing is drawn, after a file, at another initialisation, with the visible zeros."""
    settings: dict[str, Any] = {"fedavg": {"learning_rate": 0.2, "epochs": 2}, "average": {"clients": 2}}.get(protocol, {})
    x, y = batch(dtype=torch.float32)
    spec = ClientSpec(protocol=protocol, **settings)
    client = build_client(network(dtype=torch.float32), spec, 5, defences=defences)
    simulate(client, Truth(x, y)).save(tmp_path / "update.safetensors")
    seen = Observation.load(tmp_path / "update.safetensors")
    assert seen.defences == tuple(d.spec for d in defences)
    known = operator(seen, network(dtype=torch.float32))
    close(known(x, y), seen.update, rtol=1e-5, atol=1e-8)
    update, transpose = known.vjp(x, y)
    close(update, seen.update, rtol=1e-4, atol=1e-7)
    assert bool(transpose(random_like(update)).isfinite().all())


def test_pruned_entries_are_left_out_of_the_comparison() -> None:
    """Zeros of the observed update select what is compared, at any images; hidden zeros select nothing."""
    (x, y), other = batch(), batch()[0].flip(0).square()
    client = defend(FedSGD(network()), [Prune(fraction=0.9)])
    seen = simulate(client, Truth(x, y))
    mask = visible_mask(seen)
    for keep in mask.values():
        assert int(keep.sum()) == max(1, keep.numel() - math.floor(0.9 * keep.numel()))
    known, plain = operator(seen, network()), FedSGD(network())
    update, transpose = known.vjp(other, y)
    assert same(update, {name: t * mask[name] for name, t in plain.vjp(other, y)[0].items()})
    u = random_like(update)
    masked = {name: t * mask[name] for name, t in u.items()}
    assert torch.equal(transpose(u), plain.vjp(other, y)[1](masked))

    noisy = simulate(defend(FedSGD(network()), [Prune(fraction=0.9), Gaussian(sigma=0.1)]), Truth(x, y))
    assert all(bool(keep.all()) for keep in visible_mask(noisy).values())
    assert same(operator(noisy, network())(x, y), client(x, y))  # he prunes as the client does


def test_masks_follow_the_operator() -> None:
    (x, y), mask = batch(), Mask({"4.weight": torch.eye(4, 36, dtype=torch.bool)})
    client = defend(FedSGD(network()), [mask])
    moved = client.to("cpu", torch.float32)
    assert moved(x.float(), y)["4.weight"].count_nonzero() == 4
    assert moved(x.float(), y)["0.weight"].all()


def test_soteria_scores_are_those_of_the_jacobian() -> None:
    """||dr_f/dx|| / |r_f| summed over the images, by the full Jacobian; the smallest are pruned."""
    (x, y), model = batch(3), network()
    features = model[:4]
    jacobian = torch.autograd.functional.jacobian(lambda x: features(x), x)  # images x features x images x C x H x W
    slopes = torch.stack([jacobian[i, :, i].flatten(1).norm(dim=1) for i in range(3)])
    score = (slopes / features(x).abs()).sum(0)
    expected = score.argsort()[:12].sort().values
    defended = defend(FedSGD(model), [Soteria(fraction=1 / 3)])
    sent, plain = defended(x, y), FedSGD(model)(x, y)
    zero = (sent["4.weight"] == 0).all(0).nonzero().flatten()
    assert torch.equal(zero, expected)
    rest = [f for f in range(36) if f not in zero.tolist()]
    assert torch.equal(sent["4.weight"][:, rest], plain["4.weight"][:, rest])
    assert all(torch.equal(sent[name], plain[name]) for name in plain if name != "4.weight")
    costs = [distortion(defend(FedSGD(model), [Soteria(fraction=f)])(x, y), plain) for f in (0, 0.2, 0.6, 1.0)]
    assert costs == sorted(costs)
    assert costs[0] == 0


def test_soteria_leaves_dead_features_and_shows_its_columns() -> None:
    """A feature that is zero for all images is chosen last; the attacker's mask covers the columns and nothing else."""
    model, (x, y) = network(), batch()
    model[2] = nn.ReLU()
    with torch.no_grad():
        model[0].bias[1] = -100.0  # features 9 to 17 are dead
    defence = Soteria(fraction=0.25)
    mask = defence.at(FedSGD(model), x).keep
    assert list(mask) == ["4.weight"]
    assert mask["4.weight"][:, 9:18].all()
    assert int((~mask["4.weight"][0]).sum()) == 9
    seen = simulate(defend(FedSGD(model), [defence]), Truth(x, y))
    found = defence.given(seen, FedSGD(model))
    assert isinstance(found, Mask)
    assert list(found.keep) == ["4.weight"]
    assert torch.equal(found.keep["4.weight"], seen.update["4.weight"].any(0).expand(4, 36))


def test_soteria_needs_a_last_linear_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 6), nn.Flatten()).double()
    with pytest.raises(ModelError, match=r"soteria.*last linear layer"):
        defend(FedSGD(model), [Soteria(fraction=0.5)])(*batch())


def clipped_by_hand(model: nn.Module, x: Tensor, y: Tensor, bound: float) -> Update:
    """The mean over images of clipped gradients, image by image with backward()."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image, label in zip(x, y, strict=True):
        model.zero_grad()
        cross_entropy(model(image[None]), label[None]).backward()
        size = torch.stack([p.grad.norm() for p in model.parameters()]).norm()  # type: ignore[union-attr]
        for name, p in model.named_parameters():
            total[name] += p.grad * min(1.0, bound / float(size)) / len(x)
    return total


@pytest.mark.parametrize("bound", [0.05, 0.75, 100.0])
@pytest.mark.parametrize("middle", [None, lambda n: nn.GroupNorm(2, n)], ids=["plain", "group norm"])
def test_dp_sgd_clips_every_image(opacus: Any, bound: float, middle: Any) -> None:
    """Opacus' clipped mean, and the attacker's average of clipped clients, against an explicit loop; its transpose as well."""
    (x, y), model = batch(), network(middle)
    client = DPSGD(clip=bound, noise=0.0).wrap(FedSGD(model))
    assert isinstance(client, PerImage)
    expected = clipped_by_hand(copy.deepcopy(model), x, y, bound)
    close(client.sent(x, y, torch.Generator()), expected, rtol=1e-8, atol=1e-12)
    update, transpose = client.vjp(x, y)
    close(update, expected, rtol=1e-8, atol=1e-12)
    close(client(x, y), expected, rtol=1e-8, atol=1e-12)

    leaf, u = x.clone().requires_grad_(), random_like(update)
    total = torch.zeros((), dtype=x.dtype)
    for i in range(len(x)):
        value = cross_entropy(model(leaf[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        size = torch.stack([g.norm() for g in gradients]).norm()
        factor = torch.clamp(bound / size, max=1.0) / len(x)
        total = total + sum(
            (factor * g * u[name]).sum() for (name, _), g in zip(model.named_parameters(), gradients, strict=True)
        )
    (wanted,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(transpose(u), wanted, rtol=1e-7, atol=1e-13)
    fast = client.vjp(x, y, engine=secant)[1](u)
    assert float((fast - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.filterwarnings("ignore:Optimal order")
def test_dp_sgd_noise(opacus: Any) -> None:
    """Standard deviation z C / B on every entry, from the seed; more noise, more distortion and a smaller epsilon."""
    (x, y), model = batch(), network()
    quiet = DPSGD(clip=1.0, noise=0.0).wrap(FedSGD(model)).sent(x, y, torch.Generator())
    client = DPSGD(clip=1.0, noise=2.0).wrap(FedSGD(model))
    sent, again, other = (client.sent(x, y, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert same(sent, again)
    assert not same(sent, other)
    noise = torch.cat([(sent[name] - quiet[name]).flatten() for name in quiet])
    assert float(noise.std()) == pytest.approx(2.0 / 5, rel=0.1)
    spec, truth = ClientSpec(), Truth(x.float(), y)
    costs = [
        defence_costs(
            network(dtype=torch.float32), spec, truth, defences=[DPSGD(clip=1.0, noise=z, steps=10, sample_rate=0.01)]
        )
        for z in (0.0, 0.5, 1.0, 4.0)
    ]
    totals, epsilons = [c[0].total for c in costs], [c[0].epsilon for c in costs]
    assert totals == sorted(totals)
    assert epsilons[0] is None
    assert epsilons[1:] == sorted(epsilons[1:], reverse=True)  # type: ignore[type-var]
    # one full-batch step of z = 1: Renyi's alpha / 2 and Opacus' conversion, minimised over its alphas
    assert DPSGD(clip=1.0, noise=1.0).epsilon == pytest.approx(4.75, abs=0.15)


def test_dp_sgd_replaces_batch_norm_and_says_so(opacus: Any, tmp_path: Path) -> None:
    """The model is another one: for the client, in its notes, and when the server rebuilds it from the file."""
    from opacus.validators import ModuleValidator

    spec = ModelSpec(name="resnet20-cifar", width=2, num_classes=4)
    model = models.build(spec, image_shape=(3, 8, 8))
    defences = [DPSGD(clip=1.0, noise=0.0)]
    changed, notes = prepare(model, defences)
    assert "19 batch-norm layers were replaced by group norm" in notes[0]
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    fixed = ModuleValidator.fix(model)
    assert [repr(m) for m in changed.modules()] == [repr(m) for m in fixed.modules()]
    assert ModuleValidator.is_valid(changed)
    assert prepare(model, [Clip(norm=1.0)]) == (model, ())

    truth = Truth(torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1]))
    client = build_client(model, ClientSpec(), 3, defences=defences)
    assert client.notes == notes
    assert not client.has_batch_statistics
    simulate(client, truth, model=spec).save(tmp_path / "update.safetensors")
    seen = Observation.load(tmp_path / "update.safetensors")
    known = operator(seen, model)
    assert known.notes == notes
    close(known(truth.images, truth.labels), seen.update, rtol=1e-3, atol=1e-6)
    with pytest.raises(ModelError, match=r"dp-sgd: F has batch norm.*prepare"):
        defences[0].wrap(FedSGD(model))


def test_dp_sgd_of_each_client_behind_secure_aggregation(opacus: Any) -> None:
    (x, y), defence = batch(), DPSGD(clip=0.5, noise=0.0)
    client = build_client(network(), ClientSpec(protocol="average", clients=[2, 3]), 5, defences=[defence])
    assert isinstance(client, Average)
    close(client.sent(x, y, torch.Generator()), clipped_by_hand(network(), x, y, 0.5), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("inside", [Defended(FedSGD(network()), Clip(norm=1.0)), FedAvg(network(), learning_rate=0.1)])
def test_dp_sgd_comes_first(inside: Any) -> None:
    with pytest.raises(SpecError, match=r"dp-sgd clips the gradient of every image.*first defence.*fedsgd"):
        DPSGD(clip=1.0, noise=1.0).wrap(inside)


def test_without_opacus_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulating DP-SGD needs it; attacking what was sent does not."""
    monkeypatch.setitem(sys.modules, "opacus", None)
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    client, (x, y) = DPSGD(clip=1.0, noise=1.0).wrap(FedSGD(network())), batch()
    with pytest.raises(SpecError, match=r'pip install "gradleak\[opacus\]"'):
        client.sent(x, y, torch.Generator())
    with pytest.raises(SpecError, match=r"gradleak\[opacus\]"):
        _ = DPSGD(clip=1.0, noise=1.0).epsilon
    client.vjp(x, y)


def test_costs_add_up() -> None:
    """Each defence against the update before it, all against the undefended one, with the seed of what was sent."""
    x, y = batch(dtype=torch.float32)
    defences: list[Defence] = [Clip(norm=0.1), Gaussian(sigma=0.5)]
    spec, model = ClientSpec(transport="4-bit"), network(dtype=torch.float32)
    costs = defence_costs(model, spec, Truth(x, y), defences=defences, seed=3)
    assert [c.name for c in costs] == ["clip", "gaussian", "transport"]
    plain = FedSGD(model)(x, y)
    sent = simulate(build_client(model, spec, 5, defences=defences), Truth(x, y), seed=3).update
    assert costs[0].distortion == costs[0].total == distortion(Clip(norm=0.1)(plain), plain)
    assert costs[1].distortion == pytest.approx(0.5, rel=0.2)
    assert costs[-1].total == distortion(sent, plain)
    assert defence_costs(model, ClientSpec(), Truth(x, y), defences=[]) == []
    assert distortion(plain, plain) == 0


def test_the_seed_of_the_noise_stays_with_the_client(tmp_path: Path) -> None:
    """Equal seeds send equal bytes, also with two noises, which are not equal; the observation knows the defence only."""
    x, y = batch(dtype=torch.float32)
    client = defend(FedSGD(network(dtype=torch.float32)), [Gaussian(sigma=0.5), Gaussian(sigma=0.5)])
    first, again, other = (simulate(client, Truth(x, y), seed=seed) for seed in (12345, 12345, 2))
    assert same(first.update, again.update)
    assert not same(first.update, other.update)
    plain = client(x, y)
    assert distortion(first.update, plain) == pytest.approx(math.sqrt(0.5**2 + 0.5**2 * 1.25), rel=0.2)
    first.save(tmp_path / "update.safetensors")
    assert "12345" not in str(read_tensors(tmp_path / "update.safetensors")[1])
    assert Observation.load(tmp_path / "update.safetensors").defences == (Gaussian(sigma=0.5).spec,) * 2
    assert same(operator(first, network(dtype=torch.float32))(x, y), plain)


def test_specifications_of_defences(tmp_path: Path) -> None:
    """[[defence]] tables in their order, on the command line too, written out and read back."""
    file = tmp_path / "spec.toml"
    file.write_text('seed = 3\n[[defence]]\nname = "clip"\nnorm = 2\n[[defence]]\nname = "dp-sgd"\nclip = 1.0\nnoise = 1.1\n')
    spec = load(file)
    assert parse(spec.defence) == [Clip(norm=2.0), DPSGD(clip=1.0, noise=1.1)]
    again = tmp_path / "again.toml"
    again.write_text(dump(spec))
    assert load(again) == spec
    typed = load(None, ['defence=[{name="prune", fraction=0.5}, {name="sign"}]', "threat.batch_statistics=true"])
    assert parse(typed.defence) == [Prune(fraction=0.5), Sign()]
    assert typed.threat.batch_statistics
    assert parse([Prune(fraction=0.5).spec]) == [Prune(fraction=0.5)]
    assert set(available()) == set(DEFENCES)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "gausian", "sigma": 1}, ["defence.0.name", "did you mean 'gaussian'"]),
        ({"name": "gaussian", "sigm": 1}, ["defence.0.sigm", "'gaussian'", "did you mean 'sigma'"]),
        ({"name": "gaussian"}, ["defence.0.sigma", "required"]),
        ({"name": "gaussian", "sigma": -1}, ["defence.0.sigma", "greater"]),
        ({"name": "prune", "fraction": 1.5}, ["defence.0.fraction", "1"]),
        ({"name": "quantise", "bits": 1}, ["defence.0.bits", "2"]),
        ({"name": "sign", "bits": 1}, ["defence.0.bits", "none"]),
        ({"name": "dp-sgd", "clip": 1.0}, ["defence.0.noise"]),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SpecError) as error:
        parse([DefenceSpec.model_validate(settings)])
    assert all(word in str(error.value) for word in words), error.value


def test_one_bracket_too_few_is_named() -> None:
    with pytest.raises(SpecError, match=r"defence: .*\[\[defence\]\]"):
        load(None, ["defence.name=clip"])
    with pytest.raises(SpecError, match=r"defence.0.name"):
        load(None, ["defence=[{norm=1.0}]"])
