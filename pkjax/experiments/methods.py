"""The models, pruners and data sets that can be chosen by name, those of the user's own among them."""

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import pkjax as pk
from pkjax.data.dataset import Dataset
from pkjax.experiments.named_models import MODELS, SIGNAL_MODELS, named_model
from pkjax.experiments.trained_masks import TRAINED
from pkjax.experiments.user_code import find, is_own
from pkjax.experiments.user_methods import check_user, score_arguments, user_data, user_model, user_steps
from pkjax.programs.program import BoundProgram, trace
from pkjax.trees import ApplyFn, Choice, select

__all__ = ["MODELS", "PRUNERS", "MaskFn", "Pruner", "check_compression", "check_name", "compiled", "images_of", "model",
           "pruned", "pruner_of", "score", "steps_of", "weights"]

GRASP_TEMPERATURE = 200.0

ScoreFn = Callable[..., PyTree]


class Case(NamedTuple):
    """What a score is built from."""

    apply_fn: ApplyFn
    examples: Dataset
    seed: int
    mean: np.ndarray | None
    """(1, H, W, C), the mean raw image for -dist; None takes that of the examples."""
    gates: str | None = None
    """"frozen" for a network that is not a sum over paths otherwise."""
    reference: Any = None
    """(M, H, W, C), where its coefficients are taken."""

    @property
    def freezing(self) -> dict[str, Any]:
        """The arguments of scores of paths that say so."""
        return {} if self.gates is None else {"gates": self.gates, "reference": jnp.asarray(self.reference)}


class MaskFn(NamedTuple):
    """What finds masks for a compression without a score: (params, compression=…) → PruneResult."""

    find: Callable[..., pk.PruneResult]


class Pruner(NamedTuple):
    """How a pruner scores weights."""

    build: Callable[[Case], ScoreFn | MaskFn]
    steps: int = 1
    """Pruning steps by default."""
    seeded: bool = True
    """Whether scores depend on the seed: by a key, or by the images that it chooses."""
    paths: bool = False
    """Whether it asks for paths."""


def _loss(case: Case, temperature: float = 1.0) -> Callable[[PyTree], Array]:
    def loss(params: PyTree) -> Array:
        logits = case.apply_fn(params, jnp.asarray(case.examples.images)) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(case.examples.labels)).mean()

    return loss


def _random(case: Case) -> ScoreFn:
    return lambda params: pk.random(params, key=jax.random.key(case.seed))


def _magnitude(case: Case) -> ScoreFn:
    return pk.magnitude


def _snip(case: Case) -> ScoreFn:
    return lambda params: pk.snip(_loss(case), params)


def _grasp(case: Case) -> ScoreFn:
    return lambda params: pk.grasp(_loss(case, GRASP_TEMPERATURE), params)


def _fisher(case: Case) -> ScoreFn:
    def mean_loss(params: PyTree, batch: tuple[Array, Array]) -> Array:
        logits = case.apply_fn(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    batches = [(jnp.asarray(case.examples.images), jnp.asarray(case.examples.labels))]
    return lambda params: pk.fisher(mean_loss, params, batches)


def _ntk_sap(case: Case) -> ScoreFn:
    def score_fn(params: PyTree, masks: PyTree) -> PyTree:
        return pk.ntk_sap(case.apply_fn, params, case.examples.images.shape[1:], key=jax.random.key(case.seed),
                          masks=masks)

    return score_fn


def _phew(case: Case) -> MaskFn:
    x = pk.ones_input(case.examples.images.shape[1:])

    def find(params: PyTree, compression: float | int) -> pk.PruneResult:
        network = case.apply_fn if case.gates is None else pk.paths.frozen(case.apply_fn, params, case.reference)
        return pk.phew(network, params, x, key=jax.random.key(case.seed), compression=compression)

    return MaskFn(find)


def _ones(saliency: Callable[..., PyTree]) -> Callable[[Case], ScoreFn]:
    def build(case: Case) -> ScoreFn:
        z = pk.ones_input(case.examples.images.shape[1:])
        return lambda params: saliency(case.apply_fn, params, z, **case.freezing)

    return build


def _dist(saliency: Callable[..., PyTree]) -> Callable[[Case], ScoreFn]:
    def build(case: Case) -> ScoreFn:
        z = pk.mean_input(case.examples.raw) if case.mean is None else jnp.asarray(case.mean)
        return lambda params: saliency(case.apply_fn, params, z, **case.freezing)

    return build


def _of_images(saliency: Callable[..., PyTree], paths: bool) -> Callable[[Case], ScoreFn]:
    def build(case: Case) -> ScoreFn:
        def score_fn(params: PyTree, masks: PyTree) -> PyTree:     # tells an absent weight from one that is merely 0
            return saliency(case.apply_fn, params, jnp.asarray(case.examples.images), masks=masks,
                            **(case.freezing if paths else {}))

        return score_fn

    return build


# Steps: for SynFlow Tanaka et al. (2020); for PX the launch scripts of its authors (iurada/px-ntk-pruning).
PRUNERS = {
    "random": Pruner(_random),
    "magnitude": Pruner(_magnitude, seeded=False),
    "snip": Pruner(_snip),
    "iterative-snip": Pruner(_snip, steps=100),
    "grasp": Pruner(_grasp),
    "fisher": Pruner(_fisher),
    "synflow": Pruner(_ones(pk.synflow), steps=100, seeded=False, paths=True),
    "synflow-l2": Pruner(_ones(pk.synflow_l2), steps=100, seeded=False, paths=True),
    "synflow-dist": Pruner(_dist(pk.synflow), steps=100, seeded=False, paths=True),
    "synflow-l2-dist": Pruner(_dist(pk.synflow_l2), steps=100, seeded=False, paths=True),
    "path-exclusion": Pruner(_of_images(pk.path_exclusion, paths=True), steps=100, paths=True),
    "ntk-trace": Pruner(_of_images(pk.ntk_trace_saliency, paths=False)),
    "ntk-sap": Pruner(_ntk_sap, steps=20),
    "phew": Pruner(_phew, paths=True),
}
"""Name on the command line → pruner."""


def check_name(name: str, what: str) -> None:
    """Refuse a model, pruner or data set that is unknown, or whose function has other arguments than it is given.

    Raises:
        ValueError: the name is unknown, or its module or function cannot be found.
        TypeError: the function takes other arguments.
    """
    if is_own(name):
        check_user(name, what)
    elif what == "model":
        model(name, 10)
    elif what == "pruner":
        if name not in (*PRUNERS, *TRAINED, "none"):
            raise ValueError(f"unknown pruner {name!r}; choose from none, {', '.join((*PRUNERS, *TRAINED))}{_OR_OWN}")
    elif name not in pk.data.names:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(pk.data.names)}{_OR_OWN}")


_OR_OWN = ', or name a function of your own, such as "my_module:function"'


def pruner_of(name: str) -> Pruner:
    """Return the pruner of a name.

    Raises:
        ValueError: the pruner is unknown.

    Examples:
        >>> pruner_of("synflow").steps
        100
    """
    if is_own(name):
        return Pruner(partial(_own_score, name), steps=user_steps(name))
    if name not in PRUNERS:
        raise ValueError(f"unknown pruner {name!r}; choose from {', '.join(PRUNERS)}{_OR_OWN}")
    return PRUNERS[name]


def _own_score(name: str, case: Case) -> ScoreFn:
    """Build the score function of a function of the user's own, which gets the arguments that it names."""
    function, takes = find(name, "pruner"), score_arguments(name)
    known = {"apply_fn": case.apply_fn, "images": jnp.asarray(case.examples.images),
             "labels": jnp.asarray(case.examples.labels), "loss": _loss(case), "key": jax.random.key(case.seed),
             **{"gates": None, "reference": None, **case.freezing}}
    given = {argument: value for argument, value in known.items() if argument in takes}
    if "masks" not in takes:
        return lambda params: function(params=params, **given)

    def score_fn(params: PyTree, masks: PyTree) -> PyTree:
        return function(params=params, masks=masks, **given)

    return score_fn


def images_of(name: str, split: str) -> Dataset:
    """Load all images of a split, of `pk.data.load` or of the user's own.

    Examples:
        >>> len(images_of("digits", "test"))
        360
    """
    return user_data(name)[split == "test"] if is_own(name) else pk.data.load(name, split=split)


def score(pruner: str, apply_fn: ApplyFn, examples: Dataset, *, seed: int, mean: np.ndarray | None = None,
          gates: str | None = None, reference: Any = None) -> ScoreFn | MaskFn:
    """Build the score function of a pruner.

    Args:
        pruner: one of `PRUNERS`, or the full name of a score of the user's own.
        apply_fn: the network.
        examples: labelled images for SNIP and GraSP; PX and the tangent kernel's trace use only the images.
        seed: for random scores.
        mean: (1, H, W, C), the mean raw image for -dist; None takes that of `examples`.
        gates: None or "frozen".
        reference: with "frozen", the input whose coefficients are taken.

    Raises:
        ValueError: the pruner is unknown.
    """
    return pruner_of(pruner).build(Case(apply_fn, examples, seed, mean, gates, reference))


def steps_of(pruner: str, steps: int | None) -> int:
    """Return the number of pruning steps: the given one, or the pruner's default for None.

    Examples:
        >>> steps_of("synflow", None), steps_of("snip", None), steps_of("snip", 3)
        (100, 1, 3)
    """
    if steps is not None:
        return steps
    return (TRAINED[pruner] if pruner in TRAINED else pruner_of(pruner)).steps


@lru_cache(maxsize=32)
def model(name: str, classes: int, shape: tuple[int, ...] | None = None) -> Any:
    """Build the Linen module of a name, for images of a shape (H, W, C); that of CIFAR's by default.

    Raises:
        ValueError: the name is unknown, or the network does not take such images.
        TypeError: a function of the user's own returns no network.

    Examples:
        >>> model("fc-100x2", 10).depth, model("resnet20-plain", 10).plain
        (2, True)
    """
    if is_own(name):
        return user_model(name, classes)
    network = named_model(name, classes, *([] if shape is None else [shape]))
    if network is None:
        raise ValueError(f"unknown model {name!r}; choose fc-WIDTH or fc-WIDTHxDEPTH (such as fc-100x6), or one of "
                         f"{', '.join(MODELS)} (add -plain to leave out BatchNorm), or with gates frozen one of "
                         f"{', '.join(SIGNAL_MODELS)}{_OR_OWN}")
    return network


def weights(params: PyTree, prunable: Choice = pk.kernels) -> int:
    """Count the weights that can be pruned.

    Examples:
        >>> weights({"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)})
        6
    """
    both = zip(jax.tree.leaves(params), jax.tree.leaves(select(prunable, params)), strict=True)
    return sum(leaf.size for leaf, chosen in both if chosen)


@jax.jit
def _evaluate(program: BoundProgram, params: PyTree, masks: PyTree) -> PyTree:
    return program(params, masks)


def compiled(score_fn: ScoreFn | MaskFn, params: PyTree) -> ScoreFn | MaskFn:
    """Trace a score function once, for parameters of these shapes; equal operations on other images compile nothing.

    `pk.prune` then needs no `jit`: selecting the best scores is a program of its own, one for all pruners.

    Examples:
        >>> compiled(pk.magnitude, {"kernel": jnp.ones(2)})({"kernel": -2 * jnp.ones(2)}, {"kernel": jnp.ones(2, bool)})
        {'kernel': Array([2., 2.], ...)}
    """
    if isinstance(score_fn, MaskFn):
        return score_fn
    takes_masks = "masks" in inspect.signature(score_fn).parameters

    def scores(params: PyTree, masks: PyTree) -> PyTree:
        return score_fn(params, masks=masks) if takes_masks else score_fn(params)

    program = BoundProgram(*trace(scores, params, jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, bool), params),
                                  opaque=True))
    return lambda params, masks: _evaluate(program, params, masks)


def check_compression(params: PyTree, compression: float | int, prunable: Choice = pk.kernels) -> None:
    """Raise ValueError where a compression keeps no weight at all."""
    total = weights(params, prunable)
    if round(total * 10**-compression) == 0:
        most = np.floor(100 * np.log10(2 * total)) / 100
        raise ValueError(f"a compression of {compression:g} keeps none of the {total:,} weights; "
                         f"one below {most:.2f} keeps some")


def pruned(score_fn: ScoreFn | MaskFn, params: PyTree, *, compression: float | int, steps: int, jit: bool = True,
           prunable: Choice = pk.kernels) -> pk.PruneResult:
    """Prune as `pk.prune` does, but never to nothing.

    Raises:
        ValueError: the compression keeps no weight at all (found before anything is computed), or as in `pk.prune`.

    Examples:
        >>> pruned(pk.magnitude, {"kernel": jnp.eye(4)}, compression=2, steps=1)
        Traceback (most recent call last):
        ...
        ValueError: a compression of 2 keeps none of the 16 weights; one below 1.50 keeps some
    """
    check_compression(params, compression, prunable)
    if isinstance(score_fn, MaskFn):
        return score_fn.find(params, compression=compression)
    return pk.prune(score_fn, params, compression=compression, steps=steps, jit=jit, prunable=prunable)
