"""Costs counted on tensors without values are those of a real step, and those of a formula by hand: parameters, FLOPs,
bytes that autograd keeps; what is drawn enters by its mean."""

import pytest
import torch

from looped.config import load_config
from looped.cost.counts import Counts, format_counts
from looped.cost.counts import count as counted_anew
from looped.cost.traced_flops import Products, flops_of, kept_bytes
from looped.domains import domain_of
from looped.models.build import build
from looped.nn.wide_attention import SHORT
from looped.objectives import build_objective
from looped.precision import Precision
from looped.rng import StepRandom

pytestmark = pytest.mark.usefixtures("unchecked")  # others check the shapes of the same calls

VOCAB, ROWS, LENGTH = 100, 3, 32
SMALL = {"model.width": 64, "model.num_heads": 4, "model.ffn_width": 96, "model.num_prelude_layers": 1,
         "model.num_core_layers": 1, "model.num_coda_layers": 1, "data.length": LENGTH, "training.batch_size": ROWS,
         "denoise.cond_width": 16, "denoise.target.dim": 8, "recurrence.mean": 4, "recurrence.backprop": 2,
         "recurrence.distribution": "fixed"}
TASK = {"task.name": "prefix-sums", "task.difficulty": [20, 20]}
UNTIED = {"model.num_core_layers": 4, "blocks.num": 2, "blocks.layers": [1, 3]}
DIGITS = {"images.source": "digits", "model.patch_size": 2}
TWO_OF_DIGITS = DIGITS | {"blocks.num": 2, "model.num_core_layers": 2}
PIXELS = {**DIGITS, "images.goal": "generate", "model.num_prelude_layers": 0, "model.num_coda_layers": 0,
          "model.num_core_layers": 4, "model.injection": "none", "denoise.weight": "edm"}
SOLVED = {"fixed_point.max_steps": 4, "fixed_point.tol": 0.0, "fixed_point.solver": "fixed_point_iter"}


def config_of(arm="full", **settings):
    objective, _, context = arm.partition(":")
    return load_config(None, SMALL | {"objective": objective, "denoise.context": context or "inject"} | settings)


class Decided(StepRandom):
    """Real draws, with decisions that are made beforehand."""

    def __init__(self, decisions):
        super().__init__(0, 0, count=ROWS)
        self.decisions = decisions

    def decide(self, name, draw):
        return self.decisions[name] if name in self.decisions else draw()


def objective_of(config):
    inputs = domain_of(config).typical_inputs(config)
    return build_objective(config, build(config, VOCAB, inputs.picture), 0).train()


def real_costs(config, decisions=None):
    """(forward FLOPs, FLOPs with backward, bytes kept) of a real step of `ROWS` sequences."""
    objective, (part,) = objective_of(config), domain_of(config).typical_inputs(config).micro_batches

    def loss():
        with Precision.of(config, "cpu").autocast():
            return objective(part, Decided(decisions or {})).value

    with Products() as forward:
        kept, value = kept_bytes(loss, objective)
    return forward.get_total_flops(), forward.get_total_flops() + flops_of(value.backward), kept


def mean_costs(config):
    costs = [(weight, real_costs(config, decisions)) for weight, decisions in objective_of(config).decisions()]
    return [sum(weight * cost[place] for weight, cost in costs) for place in range(3)]


COUNTED: dict[tuple[str, int], Counts] = {}


def count(config, vocab_size):
    """The counts of a config, which several tests ask for, once."""
    key = config.model_dump_json(), vocab_size
    if key not in COUNTED:
        COUNTED[key] = counted_anew(config, vocab_size)
    return COUNTED[key]


def counted(config):
    counts = count(config, VOCAB)
    return [counts.forward_flops, counts.step_flops, counts.saved_activation_bytes]


CASES = [
    ("full", {}), ("truncated", UNTIED), ("ar", {"model.ffn": "gelu", "model.qk_norm": True, "model.num_kv_heads": 2}),
    ("progressive", {}), ("one-step", {"supervision.segments": 3, "supervision.steps": 2}),
    ("fixed-point", SOLVED | {"fixed_point.gradient": "implicit", "model.injection": "diagonal"}),
    ("denoise:inject", {"training.precision": "bf16"}), ("denoise:concat", {"denoise.carry": "latent"}),
    ("denoise:context", {"denoise.block_size": 4, "denoise.train_steps": 2}),
    ("blockwise", UNTIED | {"blocks.shared": "frozen", "blocks.choose": "mass"}), ("masked", {"masked.cond_width": 16}),
    ("full", TASK), ("denoise", PIXELS | {"model.block": "sandwich"}), ("noprop-dt", TWO_OF_DIGITS),
    ("noprop-ct", DIGITS | {"noprop.embedding": "one-hot"}),
    ("forward-forward", DIGITS | {"model.num_prelude_layers": 0, "model.num_coda_layers": 0, "model.injection": "none",
                                  "forward_forward.negatives": "hard"})]
FURTHER = [
    ("full", {"recurrence.loss_on": "every", "training.precision": "bf16"}), ("fixed-point", SOLVED),
    ("denoise:concat", {"data.documents": "separate"}), ("denoise:inject", TASK | {"task.window": 2}),
    ("blockwise:concat", UNTIED | {"denoise.carry": "estimate"}), ("masked", UNTIED | {"masked.schedule": "cosine"}),
    ("denoise", DIGITS), ("blockwise", PIXELS | {"blocks.num": 2, "training.precision": "bf16"}), ("noprop-fm", DIGITS)]


@pytest.mark.parametrize(("arm", "settings"), [
    *CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in FURTHER)], ids=str)
def test_the_counts_are_those_of_a_real_step(arm, settings):
    if "images.source" in settings:
        pytest.importorskip("sklearn")
    config = config_of(arm, **settings)
    assert counted(config) == pytest.approx(mean_costs(config), rel=1e-12, abs=0.5)


# ---- closed forms


def layer_flops(pairs):
    """Forward FLOPs of a layer per sequence: q, k, v, o, three maps of the feed-forward net, and attention's pairs."""
    return LENGTH * 2 * (4 * 64 * 64 + 3 * 64 * 96) + pairs * 2 * 2 * 64


CAUSAL = LENGTH * (LENGTH + 1) // 2


def test_a_loops_flops_are_those_of_the_closed_form():
    """Prelude, coda and head once; two of four steps with gradient, each an injection of 2 D -> D and a layer."""
    counts = count(config_of("truncated"), VOCAB)
    step = layer_flops(CAUSAL) + LENGTH * 2 * 2 * 64 * 64
    around = 2 * layer_flops(CAUSAL) + LENGTH * 2 * 64 * VOCAB
    assert counts.forward_flops == ROWS * (around + 4 * step)
    assert counts.step_flops == ROWS * (3 * around + (2 + 3 * 2) * step)


def test_a_masked_texts_flops_are_those_of_the_closed_form():
    """One pass in which all rows see each other."""
    counts = count(config_of("masked", **{"masked.cond_width": None, "model.injection": "none"}), VOCAB)
    forward = 3 * layer_flops(LENGTH**2) + LENGTH * 2 * 64 * VOCAB
    assert (counts.forward_flops, counts.step_flops) == (ROWS * forward, 3 * ROWS * forward)


def test_a_window_counts_the_pairs_inside_it():
    """Cell i of 21 sees at most two on either side: 21 x 5 pairs less 2 x 3 at the ends."""
    wide, near = (count(config_of("ar", **TASK, **{"task.window": window}), VOCAB) for window in (20, 2))
    assert wide.forward_flops - near.forward_flops == ROWS * 3 * 2 * 2 * 64 * (21**2 - (21 * 5 - 6))


def test_products_that_backward_makes_again_do_not_count():
    """Positive control: with them, a step costs the head and a fifth product of attention more."""
    config = config_of("ar")
    objective, (part,) = objective_of(config), domain_of(config).typical_inputs(config).micro_batches
    value = objective(part, Decided({})).value
    with Products() as all_of_them:
        value.backward()
    forward, whole, _ = real_costs(config)
    assert all_of_them.get_total_flops() - (whole - forward) == ROWS * LENGTH * 2 * 64 * VOCAB
    assert whole == 3 * forward


# ---- means


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_progressive_costs_the_mean_over_all_its_draws(weight):
    config = config_of("progressive", **{"recurrence.progressive_weight": weight, "recurrence.mean": 2})
    mean = torch.zeros(3, dtype=torch.float64)
    for n in range(2):
        for k in range(1, 2 - n + 1):
            mean += torch.tensor(real_costs(config, {"depth": (n, k)})) / (2 * (2 - n))
    assert counted(config) == pytest.approx(mean.tolist(), rel=1e-12, abs=0.5)


def test_sampled_depths_cost_their_mean():
    """A step without gradient costs its layers and injection, one with it three times that; 9 steps in the mean."""
    settings = {"recurrence.distribution": "huginn", "recurrence.mean": 8, "recurrence.backprop": 4}
    config = config_of("truncated", **settings)
    weights, decisions = zip(*objective_of(config).decisions(), strict=True)
    n, k = (sum(w * d["depth"][place] for w, d in zip(weights, decisions, strict=True)) for place in (0, 1))
    assert (n, k) == pytest.approx(objective_of(config).expected_depths(), abs=1e-12)
    assert n + k == pytest.approx(9, abs=1e-9)
    fixed = count(config_of("truncated"), VOCAB)
    step = ROWS * (layer_flops(CAUSAL) + LENGTH * 2 * 2 * 64 * 64)
    assert count(config, VOCAB).step_flops - fixed.step_flops == pytest.approx(step * (n - 2 + 3 * (k - 2)), abs=0.5)


@pytest.mark.parametrize(("rule", "uneven"), [("blockwise", {"blocks.edges": [2.0]}),
                                              ("masked", {"masked.schedule": "cosine"})])
def test_blocks_cost_the_mean_over_all_of_them(rule, uneven):
    config = config_of(rule, **UNTIED, **uneven, **{"blocks.choose": "mass"})
    shares = objective_of(config).shares.tolist()
    mean = sum(share * torch.tensor(real_costs(config, {"block": block}), dtype=torch.float64)
               for block, share in enumerate(shares))
    assert shares[0] != shares[1]
    assert counted(config) == pytest.approx(mean.tolist(), rel=1e-12, abs=0.5)


def test_micro_batches_keep_the_bytes_of_one_and_do_the_work_of_all():
    whole, half = config_of("full", **{"training.batch_size": 6}), config_of(
        "full", **{"training.batch_size": 6, "training.accumulation": 2})
    assert count(half, VOCAB).saved_activation_bytes == count(config_of("full"), VOCAB).saved_activation_bytes
    assert count(half, VOCAB).step_flops == count(whole, VOCAB).step_flops


# ---- bytes and parameters


@pytest.mark.parametrize(("arm", "settings"), [
    ("full", {}), ("full", {"model.block": "sandwich"}), ("denoise:context", {"denoise.block_size": 4})], ids=str)
def test_checkpointed_layers_keep_less_and_count_as_much_work(arm, settings):
    plain, checkpointed = (count(config_of(arm, **settings, **{"training.checkpoint_activations": on,
                                                               "recurrence.mean": 2}), VOCAB) for on in (False, True))
    assert checkpointed.saved_activation_bytes < 0.7 * plain.saved_activation_bytes
    assert (checkpointed.forward_flops, checkpointed.step_flops) == (plain.forward_flops, plain.step_flops)


def test_depth_costs_bptt_the_same_bytes_a_step_and_a_denoiser_none():
    """The loop is the positive control."""
    def kept(arm, *means):
        return [count(config_of(arm, **{"recurrence.mean": mean, "recurrence.backprop": mean}),
                      VOCAB).saved_activation_bytes for mean in means]

    one, two, four = kept("full", 1, 2, 4)
    assert two - one == (four - two) / 2 > 0
    assert len(set(kept("denoise", 1, 4))) == 1


@pytest.mark.parametrize(("arm", "settings"), [
    ("one-step", {"model.tie_embeddings": False, "model.injection": "gated", "supervision.segments": 3}),
    ("ar", UNTIED), ("full", UNTIED), ("blockwise", UNTIED),
    ("denoise:concat", {"denoise.target.tied": True, "denoise.target.dim": 64}),
    ("noprop-dt", TWO_OF_DIGITS), ("denoise", PIXELS)], ids=str)
def test_parameters_are_those_of_the_objective_and_effective_ones_of_it_written_out(arm, settings):
    config = config_of(arm, **settings)
    objective, counts = objective_of(config), count(config, VOCAB)
    assert counts.parameters == sum(p.numel() for p in objective.parameters())
    assert counts.core_parameters == sum(p.numel() for p in objective.model.recurrence.core.parameters())
    passes = {"one-step": config.main_depth, "full": 2}.get(arm, 1)  # of two blocks, two passes are four steps
    assert counts.effective_parameters == counts.parameters + (passes - 1) * counts.core_parameters


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_bytes_are_weights_gradients_and_the_optimisers_own(name):
    from looped.training.optim import build_optimizers

    config = config_of("denoise", **{"optim.name": name, "optim.ema_decay": 0.99})
    objective, (part,) = objective_of(config), domain_of(config).typical_inputs(config).micro_batches
    objective(part, Decided({})).value.backward()
    optimizers = build_optimizers(objective, config.optim)
    for optimizer in optimizers:
        optimizer.step()
    state = sum(t.nbytes for opt in optimizers for s in opt.state.values() for key, t in s.items()
                if key != "step")
    counts, weights = count(config, VOCAB), sum(p.nbytes for p in objective.parameters())
    assert counts.training_bytes == 3 * weights + state + counts.saved_activation_bytes  # also averaged weights


def test_a_block_in_its_turn_has_gradients_alone():
    config = config_of("blockwise", **UNTIED, **{"blocks.shared": "frozen"})
    counts, blocks = count(config, VOCAB), objective_of(config).model.recurrence.core.blocks
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    weights = counts.parameters + max(sizes) + 2 * sum(sizes)
    assert counts.training_bytes == 4 * weights + counts.saved_activation_bytes


def test_a_model_larger_than_memory_is_counted():
    """Nothing of it is made: 3.5 billion weights, 14 GB."""
    config = config_of("ar", **{"model.width": 4096, "model.num_heads": 32, "model.ffn_width": 16384,
                                "model.num_core_layers": 12})
    counts = count(config, 65536)
    assert counts.parameters > 3.5e9
    assert counts.step_flops == pytest.approx(6 * ROWS * LENGTH * counts.parameters, rel=0.1)


def test_a_backend_that_is_not_here_is_counted_all_the_same():
    assert counted(config_of("ar", **{"model.attention": "xformers"})) == counted(config_of("ar"))


def test_the_table_names_every_figure():
    text = format_counts(count(config_of("denoise"), VOCAB))
    assert len(text.splitlines()) == 6
    assert "MB" in text


@pytest.mark.parametrize(("device", "jumps"), [("cuda", False), ("cpu", True)])
def test_the_float32_copies_of_attention_on_the_cpu_are_counted_for_the_cpu_alone(monkeypatch, device, jumps):
    """Up to 512 keys, bf16 keeps them there: less text would need more memory than a little more."""
    monkeypatch.setattr("looped.cost.traced_flops.training_device", lambda: torch.device(device))
    settings = {"training.precision": "bf16", "model.attention": "auto"}
    short, long = (counted_anew(config_of("ar", **settings, **{"data.length": length}), VOCAB).saved_activation_bytes
                   for length in (SHORT, SHORT + 1))
    assert (short > long) == jumps
