"""The mean loss of a model over a batch or a loader, as a function of its parameters, and its derivatives.

Everything is a sum over loss terms divided by their number, batch by batch and chunk by chunk, so memory is that of one
chunk and no result depends on how the data is split.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hessinit.batches import Batches, fixed_draws, inputs_and_targets, out_of_memory, random_states_kept
from hessinit.draw import balanced_signs, signs, stream
from hessinit.losses import Loss
from hessinit.networks import wrap
from hessinit.networks.base import Alone, Array, Group, Named, Network, OnData
from hessinit.progress import track

Forward = Callable[[Any, Any], tuple[Any, Any]]


@dataclass
class Chunk:
    """Samples that go through the model together.

    Args:
        outputs: z as a function of parameter values.
        total: the total loss as a function of parameter values.
        along: of c, gives ``Σ c z`` as a function of parameter values.
        batch: what the model is given.
        targets: known, and found to fit, once ``outputs`` has been called.
        shape: of z, likewise.
    """

    outputs: OnData
    total: OnData
    along: Callable[[Array], OnData]
    batch: Any
    targets: Any = None
    shape: tuple[int, ...] = ()


class Objective:
    """The loss of a model on data.

    Args:
        function: public function that was called, for errors.
        model: ``torch.nn.Module`` or ``keras.Model``.
        batch: a pair, a dict, or a loader of either.
        loss: name, framework loss or callable.
        forward: of (model, batch), returns outputs and targets; None for the framework's way.
        chunk_size: samples at a time; None for whole batches.
        training: mode of the modules; None for the framework's usual one.
        dropout: whether dropout acts, with one fixed mask.
        seed: of the model's random choices and of every probe.
        group: processes over which the data is shared; None for this one alone.
        progress: whether to show a bar; None where standard error is a terminal.
    """

    def __init__(
        self,
        function: str,
        model: Any,
        batch: Any,
        loss: Any,
        forward: Forward | None = None,
        chunk_size: int | None = None,
        training: bool | None = None,
        dropout: bool = False,
        seed: int = 0,
        progress: bool | None = None,
        group: Group | None = None,
    ) -> None:
        self.function, self.model, self.forward, self.progress = function, model, forward, progress
        if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
            raise ValueError(f"{function}: chunk_size must be a positive integer or None; got {chunk_size!r}.")
        self.chunk_size, self.training, self.dropout, self.seed = chunk_size, training, dropout, seed
        self.network: Network = wrap(model, function)
        self.group: Group = group or Alone()
        self.splits_checked = chunk_size is None
        self._apply: Callable[[Named, Callable[[], Any]], Any] | None = None
        self._constants: list[Any] | None = None
        self._kept: list[Chunk] | None = None
        self._shared: dict[Any, Any] | None = None
        self._forms: dict[str, Callable[[Array, Any], Array]] = {  # of z and (batch, targets, ...)
            "outputs": lambda z, data: z,
            "total": lambda z, data: self.loss.total(z, data[1]),
            "along": lambda z, data: self.network.arrays.sum(z * data[2]),
        }
        with self.named_errors():
            self.batches = Batches(batch, self.network.arrays.is_array, progress)
        with self.named_errors(), self._random_state():
            first = next(iter(self.batches))
            if forward is None:
                self.network.prepare(first[0] if isinstance(first, (tuple, list)) else first, function)
            self.loss: Loss = self.network.loss(loss)
        self.parameters = {p.name: p for p in self.network.parameters()}
        self.placed: dict[str, Array] = {}  # values that stand for the model's own

    # ---- names -------------------------------------------------------------------------------------------------

    def select(self, globs: str | Sequence[str] | None, argument: str = "params") -> list[str]:
        """Names of the parameters that globs match, each tensor once, in the model's order; None for all that train.

        Raises:
            ValueError: a glob that matches nothing, or a parameter without derivatives.
        """
        parameters = self.parameters
        if globs is None:
            return [n for n, p in parameters.items() if p.tied_to is None and not p.frozen and p.differentiable]
        chosen = set()
        for glob in [globs] if isinstance(globs, str) else list(globs):
            hits = [n for n in parameters if isinstance(glob, str) and fnmatch.fnmatchcase(n, glob)]
            if not hits:
                some = ", ".join(list(parameters)[:8]) + (", …" if len(parameters) > 8 else "")
                raise ValueError(
                    f"{self.function}: {argument} must be names or globs of parameters; got {glob!r}, "
                    f"which matches none of {some}."
                )
            chosen |= {parameters[n].tied_to or n for n in hits}
        for name in sorted(chosen):
            if not parameters[name].differentiable:
                raise ValueError(
                    f"{self.function}: {argument} must be real floating-point parameters; got {name!r} "
                    f"of type {parameters[name].dtype}."
                )
        return [n for n in parameters if n in chosen]

    # ---- sums over the data --------------------------------------------------------------------------------------

    def _chunks(self) -> Iterator[Chunk]:
        """The chunks of all batches; those of data in memory are kept while the model is as it was."""
        constants, before = list(self.network.constants()), self._constants
        if before is None or any(new is not old for new, old in zip(constants, before, strict=True)):
            self._constants, self._kept, self._wholes = constants, None, self._functions()
        if not self.batches.in_memory:
            yield from (
                self._chunk(part) for batch in self.batches for part in self.batches.split(batch, self.chunk_size)
            )
            return
        if self._kept is None:
            whole = next(iter(self.batches))
            self._kept = [self._chunk(part) for part in self.batches.split(whole, self.chunk_size)]
        yield from self._kept

    def _functions(self) -> dict[str, Callable[[Any, Named], Array]]:
        """The functions of (data, values): new ones, of the model as it is."""

        def of(form: Callable[[Array, Any], Array]) -> Callable[[Any, Named], Array]:
            return lambda data, values: form(self._run(data[0], values)[0], data)

        return {name: of(form) for name, form in self._forms.items()}

    def _run(self, batch: Any, values: Named) -> tuple[Array, Any]:
        """Outputs and targets as the model gives them."""
        assert self._apply is not None  # over_data is under way
        with fixed_draws(self.seed):
            z, targets = self._apply(values, lambda: self._forward(batch))
        z = getattr(z, "logits", z)
        z = z["logits"] if isinstance(z, Mapping) and "logits" in z else z
        if not self.network.arrays.is_array(z):
            raise TypeError(f"outputs must be one tensor; got {type(z).__name__}. Pass forward= to choose it")
        return z, targets

    def _chunk(self, batch: Any) -> Chunk:
        def outputs(values: Named) -> Array:
            z, targets = self._run(batch, values)
            if chunk.targets is not None and tuple(z.shape) != chunk.shape:
                raise ValueError(f"outputs must have one shape at every call; got {tuple(z.shape)} after {chunk.shape}")
            if chunk.targets is None:
                targets = self.network.targets(targets, z)
                self.loss.check(z, targets)
                chunk.targets, chunk.shape = targets, tuple(z.shape)
            return z

        def data(*more: Array) -> Any:
            return None if chunk.targets is None else (batch, chunk.targets, *more)

        def on_data(name: str, *more: Array) -> OnData:
            form = self._forms[name]
            return OnData(lambda values: form(outputs(values), data(*more)), wholes[name], lambda: data(*more))

        wholes = self._wholes
        chunk = Chunk(on_data("outputs"), on_data("total"), lambda c: on_data("along", c), batch)
        return chunk

    def _forward(self, batch: Any) -> tuple[Any, Any]:
        if self.forward is not None:
            return self.forward(self.model, batch)
        inputs, targets = inputs_and_targets(batch)
        return self.network.forward(inputs), targets

    def _random_state(self) -> contextlib.AbstractContextManager[None]:
        """Keeps the random states that a loader or the model may use."""
        return random_states_kept(self.network.random_state())

    @contextlib.contextmanager
    def named_errors(self) -> Iterator[None]:
        """Errors of the user's model and data, with the function, the argument and the module in front."""
        try:
            yield
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
            if out_of_memory(error):
                raise
            text = f"{error}".strip().splitlines()[0] if f"{error}".strip() else type(error).__name__
            if text.startswith(f"{self.function}:"):
                raise
            where = self.network.where(error) or self.network.where(error.__cause__ or error)
            raise (TypeError if isinstance(error, TypeError) else ValueError)(
                f"{self.function}: {text.rstrip('.')}{f', in module {where}' if where else ''}."
            ) from error

    def over_data(self, work: Callable[[Chunk], tuple[Array, Any]], first: bool = False) -> Any:
        """``Σ sums / Σ count`` over the data, where work gives (an array that must be finite, sums of a chunk).

        Sums are floats, arrays, or dicts of them; if the loss is a sum, nothing is divided. ``first``: of the first
        chunk alone.
        """
        total: Any = None
        count = 0.0
        with self.named_errors(), self._random_state(), self._applied():
            for chunk in self._chunks():
                if not self.splits_checked:
                    self._check_splits(chunk)
                finite, sums = work(chunk)
                if not self.network.arrays.finite(finite):
                    raise ValueError(self._not_finite(chunk))
                count += self.loss.count(chunk.shape, chunk.targets)
                total = sums if total is None else _add(total, sums)
                if first:
                    break
        shared = self.group.sum({"sums": total, "count": count})
        total, count = shared["sums"], shared["count"]
        if count == 0 and self.loss.mean and not first:
            raise ValueError(f"{self.function}: batch must hold a term of the loss; all are ignored or of weight zero.")
        return _scale(total, 1 / (count or 1.0) if self.loss.mean else 1.0)

    @contextlib.contextmanager
    def _applied(self) -> Iterator[None]:
        """The model as a pure function, for the chunks to call; one use may lie inside another."""
        if self._apply is not None:
            yield
            return
        with self.network.pure(self.training, self.dropout, self.seed) as self._apply:
            try:
                yield
            finally:
                self._apply = None

    @contextlib.contextmanager
    def linearized(self) -> Iterator[None]:
        """The model as it is now: inside, what passes for several vectors share is computed once.

        Only where the data goes through the model in one chunk, as memory is to be that of one.
        """
        if self._shared is not None:
            yield
            return
        with self._random_state(), self._applied():
            self._shared = {}
            try:
                yield
            finally:
                self._shared = None

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What make gives, from the first time where linearizations are shared."""
        if self._shared is None or self._kept is None or len(self._kept) > 1:
            return make()
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _not_finite(self, chunk: Chunk) -> str:
        arrays = self.network.arrays
        parts = [x for x in self.batches.arrays(chunk.batch) if isinstance(x, np.ndarray) or arrays.is_floating(x)]
        bad = any(not (np.isfinite(x).all() if isinstance(x, np.ndarray) else arrays.finite(x)) for x in parts)
        if bad:
            return "batch must be finite; got NaN or infinity in the data"
        values = self.values([n for n, p in self.parameters.items() if p.differentiable and p.tied_to is None])
        weights = [name for name, value in values.items() if not arrays.finite(value)]
        which = f"parameter {weights[0]!r} is not" if weights else "data and parameters are, the outputs are not"
        return f"the model's outputs must be finite; {which}"

    def _check_splits(self, chunk: Chunk) -> None:
        """Raises where the outputs of a chunk depend on which samples it is computed with."""
        n = self.batches.samples(chunk.batch) or 0
        if n < 2:
            return
        whole = self._numpy_outputs(chunk)
        halves = [self._chunk(half) for half in self.batches.split(chunk.batch, (n + 1) // 2)]
        try:
            parts = np.concatenate([self._numpy_outputs(half) for half in halves])
            same = parts.shape == whole.shape and np.abs(parts - whole).max() <= 1e-3 * np.abs(whole).max() + 1e-30
        except Exception:  # batch norm of one sample, a model of fixed batch size, …
            same = False
        if not same:
            raise ValueError(
                f"{self.function}: chunk_size must be None for this model; got {self.chunk_size}. Its outputs depend "
                "on the other samples of a batch (batch norm in training mode, samples not on the first axis, …)."
            )
        self.splits_checked = True

    def _numpy_outputs(self, chunk: Chunk) -> Any:
        z, _ = self.network.derivatives.jvp(chunk.outputs, self.placed, {})
        return self.network.arrays.numpy(z)

    # ---- derivatives -----------------------------------------------------------------------------------------------

    def values(self, *names: Iterable[str]) -> dict[str, Array]:
        """The named parameters, and all that are placed: a compiled function must not hold these as constants."""
        return {**self.network.values(list(dict.fromkeys(n for group in names for n in group))), **self.placed}

    def check(self) -> None:
        """Raises where data, outputs and loss do not fit: of all data in memory, of a loader's first batch."""
        if np.isnan(self.value(first=not self.batches.in_memory)):
            raise ValueError(f"{self.function}: the loss must be a number; got nan, of finite outputs.")

    def value(self, first: bool = False, at: Named | None = None) -> float:
        """The loss; ``first``: of the first chunk alone; ``at``: with other values of parameters, finite or not."""
        arrays = self.network.arrays

        def work(chunk: Chunk) -> tuple[Array, float]:
            z, _ = self.network.derivatives.jvp(chunk.outputs, self.placed if at is None else at, {})
            total = float(arrays.numpy(self.loss.total(z, chunk.targets)))
            return z if at is None else arrays.asarray(0.0, z), total

        return float(self.over_data(work, first))

    def gradient(self, names: Sequence[str]) -> dict[str, Array]:
        """The loss's gradient: one backward pass."""

        def work(chunk: Chunk) -> tuple[Array, dict[str, Array]]:
            value, found = self.network.derivatives.gradient(chunk.total, self.values(names))
            return value, {name: found[name] for name in names}

        return dict(self.over_data(work))

    def quadratic_form(self, tangents: Named) -> float:
        """``vᵀ G v``: one JVP."""

        def work(chunk: Chunk) -> tuple[Array, float]:
            z, dz = self.network.derivatives.jvp(chunk.outputs, self.values(tangents), tangents)
            return z, self.network.arrays.dot(dz, self.loss.product(z, chunk.targets, dz))

        return float(self.over_data(work))

    def product(self, tangents: Named, rows: Sequence[str]) -> dict[str, Array]:
        """Rows of ``G v``: one JVP and one VJP."""
        derivatives, cols = self.network.derivatives, list(tangents)

        def work(chunk: Chunk) -> tuple[Array, dict[str, Array]]:
            values = self.values(cols, rows)
            if self._shared is None:
                z, dz, pull = derivatives.jvp_vjp(chunk.outputs, values, tangents, rows)
            else:
                key = ("product", *cols, None, *rows)
                z, push, pull = self._once(key, lambda: derivatives.linearize(chunk.outputs, values, cols, rows))
                dz = push(tangents)
            return z, pull(self.loss.product(z, chunk.targets, dz))

        return dict(self.over_data(work))

    def exact_product(self, tangents: Named, rows: Sequence[str]) -> dict[str, Array]:
        """Rows of ``H v``, H the exact Hessian: the derivative of ``gᵀv``, or of g along v, as the backend does it."""
        derivatives, cols = self.network.derivatives, list(tangents)

        def work(chunk: Chunk) -> tuple[Array, dict[str, Array]]:
            values = self.values(cols, rows)
            if self._shared is None:
                return derivatives.hvp(chunk.total, values, tangents, rows)
            key = ("exact product", *cols, None, *rows)
            value, along = self._once(key, lambda: derivatives.curve(chunk.total, values, cols, rows))
            return value, along(tangents)

        return dict(self.over_data(work))

    def probe_stream(self, probe: int) -> np.random.Generator:
        """The random numbers of one probe of the trace."""
        return stream(self.seed, "signs", str(probe), *[self.group.rank] * (self.group.size > 1))

    def squares(self, names: Sequence[str], probe: int, total: bool) -> dict[str, Any] | None:
        """The diagonal, or its sums, from ``g_s = J_sᵀ R_s ε_s`` with balanced signs ε: unbiased, one backward pass.

        ``Σ_s g_s²`` over samples where these can be told apart, else ``(Σ_s g_s)²``, whose expectation is the same and
        whose spread is larger, by products of different samples. None for a loss without an analytic root.

        Args:
            names: of the parameters wanted.
            probe: which draw of the signs.
            total: whether of each parameter the sum is enough.
        """
        arrays = self.network.arrays
        if not self.loss.analytic_root:
            return None
        rng = self.probe_stream(probe)

        def work(chunk: Chunk) -> tuple[Array, Any]:
            apart = self._once(("apart", *names), lambda: self._apart(chunk, names))
            z, pull = apart or self._once(
                ("vjp", *names), lambda: self.network.derivatives.vjp(chunk.outputs, self.values(names))
            )
            drawn = balanced_signs(rng, chunk.shape, self.loss.class_axis(chunk.shape, chunk.targets))
            rooted = self.loss.root(z, chunk.targets, arrays.asarray(drawn, z))
            squares, gradients = pull([rooted], total) if apart else ({}, pull(rooted))
            found = {name: float(arrays.numpy(s)) if total else s for name, s in squares.items()}
            found |= {name: arrays.dot(g, g) if total else g * g for name, g in gradients.items()}
            return z, {name: found[name] for name in names}

        return dict(self.over_data(work))

    def diagonal(self, names: Sequence[str]) -> dict[str, Array]:
        """The diagonal in full: a backward pass for each output of one sample, for all samples at once.

        For each output of each sample where samples cannot be told apart.
        """

        def work(chunk: Chunk) -> tuple[Array, Any]:
            apart = self._apart(chunk, names) if self.loss.analytic_root else None
            sums: dict[str, Array] = {}
            if apart is not None:
                z, pull = apart
                sums, _ = pull(self._columns(z, chunk))
            rest = [name for name in names if name not in sums]
            if rest:
                z, others = self._one_by_one(chunk, rest, lambda row: {n: g * g for n, g in row.items()})
                sums |= others
            return z, {name: sums[name] for name in names}

        return dict(self.over_data(work))

    def _columns(self, z: Array, chunk: Chunk) -> Iterator[Array]:
        """``R_s e_k`` of all samples s, for one output k after the other."""
        size = int(np.prod(chunk.shape[1:]))
        for k in track(range(size), "outputs", self.progress):
            unit = np.zeros((chunk.shape[0], size))
            unit[:, k] = 1
            yield self.loss.root(z, chunk.targets, self.network.arrays.asarray(unit.reshape(chunk.shape), z))

    def _apart(self, chunk: Chunk, names: Sequence[str]) -> tuple[Array, Any] | None:
        """Outputs and a map of some u to ``Σ_s (J_sᵀ u_s)²`` of some names and ``Jᵀu`` of the others, or None."""
        samples = self.batches.samples(chunk.batch) or 0
        few = min(2, samples - 1)
        if few < 1:
            return None
        try:
            first = self._chunk(next(iter(self.batches.split(chunk.batch, few))))
            return self.network.derivatives.squares(
                chunk.outputs, first.outputs, self.values(names), names, samples, few
            )
        except Exception as error:  # a model of fixed batch size, an operation without a rule for rows, …
            if out_of_memory(error):
                raise
            return None

    def over_columns(self, names: Sequence[str], of: Callable[[dict[str, Array]], Any]) -> Any:
        """``Σ of(Jᵀ r)`` over every column r of R, of being quadratic: a backward pass for each output entry."""
        return self.over_data(lambda chunk: self._one_by_one(chunk, names, of))

    def _one_by_one(
        self, chunk: Chunk, names: Sequence[str], of: Callable[[dict[str, Array]], Any]
    ) -> tuple[Array, Any]:
        """Outputs of a chunk, and its part of that sum.

        Samples go one at a time where that changes nothing (tried out on a random direction), so that a backward pass
        is one sample's.
        """

        def columns(chunk: Chunk) -> tuple[Array, Any]:
            z, pull = self.network.derivatives.vjp(chunk.outputs, self.values(names))
            sums: Any = None
            for sign, column in self.loss.columns(z, chunk.targets):
                new = _scale(of(pull(column)), sign)
                sums = new if sums is None else _add(sums, new)
            return z, sums

        split = self._separate(chunk, names)
        if not split:
            return columns(chunk)
        sums: Any = None
        for one in track(split, "samples", self.progress):
            _, new = columns(one)
            sums = new if sums is None else _add(sums, new)
        z, _ = self.network.derivatives.jvp(chunk.outputs, self.placed, {})
        return z, sums

    def num_outputs(self) -> int | None:
        """Entries of the outputs over all data, where it is in memory and has been through the model; else None."""
        return sum(int(np.prod(chunk.shape)) for chunk in self._kept) if self._kept else None

    def _separate(self, chunk: Chunk, names: Sequence[str]) -> list[Chunk]:
        """The chunk's samples as chunks of their own if loss and network take each by itself, else []."""
        if (self.batches.samples(chunk.batch) or 0) < 2:
            return []
        values = self.values(names)
        tangents = self.random_direction(names, "separate")

        def form(part: Chunk) -> float:
            z, dz = self.network.derivatives.jvp(part.outputs, values, tangents)
            return self.network.arrays.dot(dz, self.loss.product(z, part.targets, dz))

        whole = form(chunk)
        parts = [self._chunk(part) for part in self.batches.split(chunk.batch, 1)]
        try:
            alone = sum(form(part) for part in parts)
        except Exception:  # batch norm of one sample, a model of fixed batch size, …
            return []
        precise = all(self.parameters[name].dtype == "float64" for name in names)
        same = abs(alone - whole) <= (1e-6 if precise else 1e-3) * abs(whole)
        return parts if same else []

    def random_direction(self, names: Sequence[str], key: str) -> dict[str, Array]:
        """Random signs of the parameters' shapes, the same at every call with the same key."""
        arrays, found = self.network.arrays, {}
        for name, value in self.values(names).items():
            found[name] = arrays.asarray(signs(stream(self.seed, key, name), value.shape), value)
        return found

    def outputs_bend(self, rows: Sequence[str], cols: Sequence[str]) -> dict[str, float]:
        """How far the outputs are from linear in a block, row by row: ``|D²(cᵀz) v|`` against ``|∇(cᵀz)| / rms(w)``.

        c are random signs, v random signs on ``cols``, and z the outputs before the loss's own softmax or sigmoid. The
        curvature effect ``D_z ℓ • D²_w z`` vanishes whatever the loss exactly when these do (with probability one).
        """
        arrays, values = self.network.arrays, self.values(rows, cols)
        tangents = self.random_direction(cols, "bend")
        weights = stream(self.seed, "outputs")

        def work(chunk: Chunk) -> tuple[Array, Any]:
            drawn: list[Any] = []

            def projected(v: Named) -> Array:
                z = chunk.outputs(v)
                natural = self.loss.natural(z, chunk.targets)
                if not drawn:
                    drawn.append(signs(weights, natural.shape))
                return arrays.sum(natural * arrays.asarray(drawn[0], natural))

            value, first = self.network.derivatives.gradient(projected, values)
            _, bent = self.network.derivatives.hvp(projected, values, tangents, rows)
            # Weights of zero, as biases start, are no measure of how far a weight may move.
            rms = max(0.1, *((arrays.dot(v, v) / max(int(np.prod(v.shape)), 1)) ** 0.5 for v in values.values()))
            slope = max(arrays.dot(g, g) for g in first.values()) ** 0.5
            share = (self.loss.count(chunk.shape, chunk.targets) if self.loss.mean else 1.0) * rms / (slope or 1.0)
            return value, {name: share * arrays.dot(b, b) ** 0.5 for name, b in bent.items()}

        return dict(self.over_data(work))


def _add(x: Any, y: Any) -> Any:
    if isinstance(x, Mapping):
        return {key: _add(x[key], y[key]) for key in x}
    return x + y


def _scale(x: Any, factor: float) -> Any:
    if isinstance(x, Mapping):
        return {key: _scale(part, factor) for key, part in x.items()}
    return x * factor
