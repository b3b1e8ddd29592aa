"""The Hessian of a model's loss, or any block of it, as a linear operator: approximate or exact, one interface."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.sparse import linalg

from hessinit.draw import stream
from hessinit.networks.base import Array
from hessinit.objective import Objective
from hessinit.progress import track
from hessinit.spectrum import SpectralDensity, eigenpairs, spectral_density, spectral_norm, standard_error

Globs = str | Sequence[str]
Vector = Mapping[str, Array] | Array  # named, or flat
ROUNDING = {"float64": 1e-6, "float32": 1e-4}  # below it a second derivative is zero; 2e-2 in half precision


class Exactness(str):
    """``"exact"`` or ``"approximate"``, with the reason.

    Args:
        reason: one sentence.
    """

    __slots__ = ("reason",)
    reason: str

    def __new__(cls, kind: Literal["exact", "approximate"], reason: str) -> Exactness:
        made = super().__new__(cls, kind)
        made.reason = reason
        return made

    def __repr__(self) -> str:
        return f"{self}: {self.reason}"


class Value(float):
    """A number that knows where it is from.

    Attributes:
        standard_error: of a stochastic value; 0.0 of one that is computed in full.
        num_probes: random vectors behind it; 0 if none.
        exactness: whether it is that of the exact Hessian.
    """

    standard_error: float = 0.0
    num_probes: int = 0
    _exactness: Callable[[], Exactness]

    @property
    def exactness(self) -> Exactness:
        return self._exactness()


class Values(dict[str, Any]):
    """Values by name (numbers or tensors) that know where they are from.

    Attributes:
        standard_error: by name, for stochastic values; empty for those computed in full.
        num_probes: random vectors behind them; 0 if none.
        exactness: by name, whether they are those of the exact Hessian.
    """

    standard_error: Mapping[str, Any] = {}
    num_probes: int = 0
    _exactness: Callable[[], Mapping[str, Exactness]]

    @property
    def exactness(self) -> Mapping[str, Exactness]:
        return self._exactness()


class Hessian:
    """A block of the Hessian of the mean loss, rows × columns, in the order of the model's parameters.

    Vectors are dicts of parameter name → tensor or flat (tensors or NumPy arrays, parameters raveled and joined in the
    order of ``rows`` and ``cols``); the answer is of the same kind. A block of K vectors has one more axis, the last.

    Cost in passes, a gradient being one forward and one backward pass and a JVP about two forward passes: quadratic
    form one JVP; product one JVP and one backward pass, less where many share a linearization (``products``); trace or
    diagonal by probes one gradient a probe, in full one backward pass for each output of a sample, or for each output
    entry of the data where samples cannot be told apart; ``dense`` one product a column. The exact Hessian's products
    are gradients under a JVP, its trace and diagonal take a product a column.

    Args:
        objective: the loss on its data.
        rows: names of parameters.
        cols: names of parameters.
        exact: whether this is the exact Hessian.

    References:
        M. Skorski, "Approximating Hessians for Neural Networks", 2021, "Approximate Chain Rule". N. Schraudolph, "Fast
        curvature matrix-vector products for second-order gradient descent", Neural Computation 2002 (products).
        A. Griewank, A. Walther, "Evaluating Derivatives", 2008, chapter 3 (forward over reverse).
    """

    def __init__(self, objective: Objective, rows: Sequence[str], cols: Sequence[str], exact: bool) -> None:
        self.objective, self.rows, self.cols, self.exact = objective, tuple(rows), tuple(cols), exact
        self._shapes = {name: objective.parameters[name].shape for name in {*rows, *cols}}

    def __repr__(self) -> str:
        kind = "exact" if self.exact else "approximate"
        return f"<{kind} Hessian of shape {self.shape}, {len(self.rows)} × {len(self.cols)} parameters>"

    def _size(self, names: Sequence[str]) -> int:
        return sum(int(np.prod(self._shapes[name])) for name in names)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of row and column entries."""
        return self._size(self.rows), self._size(self.cols)

    @property
    def is_square(self) -> bool:
        """Whether rows and columns are the same parameters, so that the block is symmetric."""
        return self.rows == self.cols

    @cached_property
    def exactness(self) -> Exactness:
        """Whether this block is that of the exact Hessian, measured at the present weights and data.

        The neglected term vanishes, whatever the loss, exactly when the outputs are linear in (rows, cols): when
        ``D²(cᵀz)`` does for random c. One Hessian-vector product of the outputs, up to rounding.
        """
        if self.exact:
            return Exactness("exact", "it is the exact Hessian")
        try:
            bend = self.objective.outputs_bend(self.rows, self.cols)
        except ValueError as error:
            return Exactness("approximate", f"not checked, as second derivatives of the outputs failed ({error})")
        tolerance = max(ROUNDING.get(self.objective.parameters[n].dtype, 2e-2) for n in (*self.rows, *self.cols))
        bent = [name for name, size in bend.items() if size > tolerance]
        where = "in these parameters" if self.is_square else f"between {_some(self.rows)} and {_some(self.cols)}"
        if not bent:
            return Exactness("exact", f"the outputs have no second derivative {where}, so no term is neglected")
        size = max(bend.values())
        return Exactness(
            "approximate",
            f"the outputs have second derivatives {where} (relative size {size:.1e}, in {_some(bent)}), "
            "whose share of the Hessian is neglected",
        )

    def _blockwise_exactness(self) -> dict[str, Exactness]:
        """Of each parameter's diagonal block: what traces and diagonals depend on."""
        return exactness_of(self.objective, {name: [name] for name in self.rows}, self.exact)

    def _diagonal_exactness(self) -> Exactness:
        blocks = self._blockwise_exactness()
        bent = [name for name, exactness in blocks.items() if exactness != "exact"]
        if not bent:
            reason = next(iter(blocks.values())).reason if self.exact else "every parameter's diagonal block is exact"
            return Exactness("exact", reason)
        return Exactness("approximate", f"the outputs have second derivatives within {_some(bent)}")

    # ---- vectors ---------------------------------------------------------------------------------------------------

    def flatten(self, named: Mapping[str, Array]) -> Array:
        """Tensors of the rows or columns, by name, joined to one flat vector (or block, (n, K))."""
        return self._flatten(named, self.cols if set(named) == set(self.cols) else self.rows)

    def _flatten(self, named: Mapping[str, Array], names: Sequence[str]) -> Array:
        arrays, parts = self.objective.network.arrays, []
        for name in names:
            extra = tuple(named[name].shape)[len(self._shapes[name]) :]
            parts.append(arrays.reshape(named[name], (self._size([name]), *extra)))
        return arrays.concatenate(parts)

    def unflatten(self, flat: Array) -> dict[str, Array]:
        """A flat vector (or block) over the columns as tensors by name."""
        return self._unflatten(flat, self.cols)

    def _unflatten(self, flat: Any, names: Sequence[str]) -> dict[str, Array]:
        objective, start, named = self.objective, 0, {}
        values = objective.network.values(list(names))
        for name in names:
            shape = self._shapes[name]
            stop = start + int(np.prod(shape))
            part = objective.network.arrays.asarray(flat[start:stop], values[name])
            named[name] = objective.network.arrays.reshape(part, (*shape, *flat.shape[1:]))
            start = stop
        return named

    def _read(self, v: Any) -> tuple[dict[str, Array], int | None]:
        """A vector over the columns as tensors by name, and the number of vectors if it is a block of them."""
        objective = self.objective
        arrays = objective.network.arrays
        if not isinstance(v, Mapping):
            if not (isinstance(v, np.ndarray) or arrays.is_array(v)):
                raise TypeError(f"hessian: v must be a dict of tensors or one flat vector; got {type(v).__name__}.")
            if len(v.shape) not in (1, 2) or v.shape[0] != self.shape[1]:
                raise ValueError(
                    f"hessian: v must be of shape ({self.shape[1]},) or ({self.shape[1]}, K); got {tuple(v.shape)}."
                )
            return self._unflatten(v, self.cols), v.shape[1] if len(v.shape) == 2 else None
        if set(v) != set(self.cols):
            wrong = sorted(set(v) ^ set(self.cols))
            raise ValueError(f"hessian: v must have the columns' names; got {len(v)} names, wrong in {_some(wrong)}.")
        values = objective.network.values(list(self.cols))
        extra = tuple(v[self.cols[0]].shape)[len(self._shapes[self.cols[0]]) :]
        for name in self.cols:
            expected = (*self._shapes[name], *extra)
            if tuple(v[name].shape) != expected or len(extra) > 1:
                raise ValueError(f"hessian: v[{name!r}] must be of shape {expected[:-len(extra) or None]}, with one "
                                 f"more axis at most; got {tuple(v[name].shape)}.")  # fmt: skip
        return {name: arrays.asarray(v[name], values[name]) for name in self.cols}, extra[0] if extra else None

    def _answer(self, named: dict[str, Array], like: Any) -> Any:
        if isinstance(like, Mapping):
            return named
        flat = self._flatten(named, self.rows)
        return self._to_numpy(flat).astype(like.dtype) if isinstance(like, np.ndarray) else flat

    def _to_numpy(self, array: Array) -> npt.NDArray[Any]:
        return self.objective.network.arrays.numpy(array)

    # ---- products --------------------------------------------------------------------------------------------------

    def _product(self, tangents: Mapping[str, Array]) -> dict[str, Array]:
        if self.exact:
            return self.objective.exact_product(tangents, self.rows)
        return self.objective.product(tangents, self.rows)

    @contextlib.contextmanager
    def products(self) -> Iterator[Callable[[Vector], Any]]:
        """A context that gives the map ``v → H v``, as ``@`` has it, for many vectors; the model must not change.

        Where the data goes through the model in one chunk, all share one linearization, which is kept in memory: a
        product takes half to two thirds of the time of a single one.
        """
        with self.objective.linearized():
            yield self.__matmul__

    def _columns(self, label: str) -> Iterator[Array]:
        """Every column of the block, flat: the product with each unit vector."""
        with self.objective.linearized():
            for k in track(range(self.shape[1]), label, self.objective.progress):
                unit = np.zeros(self.shape[1])
                unit[k] = 1
                yield self._flatten(self._product(self._unflatten(unit, self.cols)), self.rows)

    def __matmul__(self, v: Vector) -> Any:
        """The product with one vector, or with each of a block of them."""
        tangents, columns = self._read(v)
        if columns is None:
            return self._answer(self._product(tangents), v)
        arrays = self.objective.network.arrays
        with self.objective.linearized():
            products = [
                self._product({name: tangents[name][..., k] for name in self.cols})
                for k in track(range(columns), "products", self.objective.progress if columns > 8 else False)
            ]
        stacked = {
            name: arrays.concatenate([arrays.reshape(p[name], (*self._shapes[name], 1)) for p in products], axis=-1)
            for name in self.rows
        }
        return self._answer(stacked, v)

    def quadratic_form(self, v: Vector) -> Value:
        """``vᵀ G v``: one JVP, no backward pass (the exact Hessian: one product).

        Raises:
            ValueError: rows and columns differ.
        """
        self._square("quadratic_form")
        tangents, columns = self._read(v)
        if columns is not None:
            raise ValueError(f"hessian: v must be one vector in quadratic_form; got a block of {columns}.")
        if self.exact:
            arrays, product = self.objective.network.arrays, self._product(tangents)
            value = sum(arrays.dot(tangents[name], product[name]) for name in self.rows)
        else:
            value = self.objective.quadratic_form(tangents)
        return self._value(value, lambda: self.exactness)

    def block(self, rows: Globs, cols: Globs | None = None) -> Hessian:
        """The part of the Hessian between some parameters: a product touches no others.

        Args:
            rows: names or globs.
            cols: likewise; None for the rows again, a diagonal block.
        """
        chosen = self.objective.select(rows, "rows")
        return Hessian(
            self.objective, chosen, chosen if cols is None else self.objective.select(cols, "cols"), self.exact
        )

    @property
    def T(self) -> Hessian:  # noqa: N802 - as in NumPy
        """The transposed block."""
        return Hessian(self.objective, self.cols, self.rows, self.exact)

    # ---- parts -----------------------------------------------------------------------------------------------------

    def diagonal(self, num_probes: int | None = None) -> Values:
        """The diagonal, by name, in full or by random signs.

        Args:
            num_probes: random vectors; None computes it in full.

        Returns:
            Tensors of the parameters' shapes; with probes their standard errors in ``.standard_error``.
        """
        self._square("diagonal")
        if num_probes is None:
            values = Values(
                {name: self._diagonal_by_columns(name) for name in self.rows}
                if self.exact
                else self.objective.diagonal(self.rows)
            )
        else:
            arrays = self.objective.network.arrays
            total: dict[str, Any] = dict.fromkeys(self.rows, 0.0)
            squares: dict[str, Any] = dict.fromkeys(self.rows, 0.0)
            for draw in self._probes(num_probes):
                total = {n: total[n] + draw[n] for n in self.rows}
                squares = {n: squares[n] + draw[n] * draw[n] for n in self.rows}
            values = Values({n: total[n] / num_probes for n in self.rows})
            values.num_probes = num_probes
            freedom = num_probes * (num_probes - 1) or float("nan")  # one probe has no spread
            values.standard_error = {
                n: arrays.sqrt(arrays.abs(squares[n] - num_probes * values[n] * values[n]) / freedom) for n in self.rows
            }
        values._exactness = self._blockwise_exactness
        return values

    def trace(self, num_probes: int | None = None) -> Value:
        """The trace, in full or by random signs.

        Args:
            num_probes: random vectors; None computes it in full.
        """
        traces = self.traces(num_probes, groups={"all": self.rows})
        value = self._value(traces["all"], self._diagonal_exactness)
        value.num_probes, value.standard_error = traces.num_probes, traces.standard_error.get("all", 0.0)
        return value

    def traces(self, num_probes: int | None = None, groups: Mapping[str, Sequence[str]] | None = None) -> Values:
        """The traces of diagonal blocks, all from the same passes.

        Args:
            num_probes: random vectors; None computes them in full.
            groups: names of the parameters of each block, by a label; default: every parameter by itself.
        """
        self._square("traces")
        groups = {name: [name] for name in self.rows} if groups is None else groups
        if num_probes is not None:
            draws = list(self._probes(num_probes, total=True))
        else:
            sum_of = self.objective.network.arrays.sum
            draws = [{name: float(self._to_numpy(sum_of(d))) for name, d in self.diagonal().items()}]
        table = np.array([[sum(draw[name] for name in names) for names in groups.values()] for draw in draws])
        values = Values(zip(groups, table.mean(axis=0).tolist(), strict=True))
        if num_probes is not None:
            values.num_probes = num_probes
            values.standard_error = dict(zip(groups, np.atleast_1d(standard_error(table)).tolist(), strict=True))
        values._exactness = lambda: exactness_of(self.objective, groups, self.exact)
        return values

    def _diagonal_by_columns(self, name: str) -> Array:
        """The diagonal of one parameter's block from its product with every unit vector."""
        columns = enumerate(self.block(name)._columns(name))
        diagonal = np.array([self._to_numpy(column)[k] for k, column in columns], np.float64)
        value = self.objective.network.values([name])[name]
        return self.objective.network.arrays.asarray(diagonal.reshape(self._shapes[name]), value)

    def _probes(self, num_probes: int, total: bool = False) -> Iterator[dict[str, Any]]:
        """One estimate of the diagonal, or of its sums, for each probe: from ``Jᵀ R ε``, else from v and ``H v``.

        Args:
            num_probes: of them.
            total: whether of each parameter the sum is enough.
        """
        dot = self.objective.network.arrays.dot
        with self.objective.linearized():
            for probe in self._probe_numbers(num_probes):
                draw = None
                if not self.exact:
                    draw = self.objective.squares(self.rows, probe, total)
                if draw is None:  # Hutchinson: E v ⊙ H v = diag H
                    v = self.objective.random_direction(self.cols, f"probe {probe}")
                    product = self._product(v)
                    draw = {n: dot(v[n], product[n]) if total else v[n] * product[n] for n in self.rows}
                yield draw

    def _probe_numbers(self, num_probes: int) -> Iterator[int]:
        if isinstance(num_probes, bool) or not isinstance(num_probes, (int, np.integer)) or num_probes < 1:
            raise ValueError(f"hessian: num_probes must be a positive integer or None; got {num_probes!r}.")
        return track(range(num_probes), "probes", self.objective.progress if num_probes > 8 else False)

    def norm(self, kind: Literal["fro", 2] = "fro", num_probes: int | None = None) -> Value:
        """Frobenius or spectral norm.

        Args:
            kind: ``"fro"`` (default) or 2, the largest singular value, by Lanczos.
            num_probes: for ``"fro"`` random vectors, ``E |G v|² = |G|²``; None computes it in full, a product for each
                column, or a backward pass and a quadratic form for each output entry if these are fewer.
        """
        if kind == 2:
            start = stream(self.objective.seed, "norm").standard_normal(self.shape[1])
            with self.products() as product, self.T.products() as adjoint:
                largest = spectral_norm(product, None if self.is_square else adjoint, start, self._tol)
            return self._value(largest, lambda: self.exactness)
        if kind != "fro":
            raise ValueError(f'hessian: kind must be "fro" or 2; got {kind!r}.')
        if num_probes is None:
            return self._value(self._full_norm(), lambda: self.exactness)
        dot = self.objective.network.arrays.dot
        squares = []
        with self.objective.linearized():
            for probe in self._probe_numbers(num_probes):
                along = self._product(self.objective.random_direction(self.cols, f"probe {probe}"))
                squares.append(sum(dot(p, p) for p in along.values()))
        value = self._value(float(np.mean(squares)) ** 0.5, lambda: self.exactness)
        value.num_probes = num_probes
        value.standard_error = standard_error(squares) / (2 * float(value)) if value else 0.0
        return value

    def _full_norm(self) -> float:
        """``|G|² = Σ_columns |G e|²``, or ``Σ rᵀJ G Jᵀr`` over the columns r of R where these are fewer."""
        outputs = self.objective.num_outputs()
        if not self.exact and self.is_square and outputs is not None and outputs < self.shape[1]:
            return float(abs(self.objective.over_columns(self.rows, self.objective.quadratic_form)) ** 0.5)
        squares = (np.sum(np.square(self._to_numpy(column), dtype=np.float64)) for column in self._columns("columns"))
        return float(sum(squares) ** 0.5)

    def eigsh(
        self,
        k: int = 6,
        which: Literal["LM", "LA", "SA", "SM"] = "LM",
        tol: float | None = None,
        ncv: int | None = None,
        maxiter: int | None = None,
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Some eigenvalues and eigenvectors, by Lanczos from the loss's gradient and a seeded random vector.

        The gradient lies mostly in the space of the largest eigenvalues. A product with the kept linearization takes
        1.3 (approximate) or 2 gradients (exact).

        Args:
            k: how many.
            which: ``"LM"`` (largest magnitude), ``"LA"`` (largest), ``"SA"`` (smallest), ``"SM"`` (smallest magnitude).
            tol: residual ``|H x - λ x| / |λ|`` to reach; the error of λ is of second order in it. None for the accuracy
                of the arithmetic where products are in float64, else 1e-3.
            ncv: vectors in the basis, in memory all at once; None for ``max(2k + 1, 20)``.
            maxiter: restarts; None for 10 n.

        Returns:
            Eigenvalues of shape (k,), ascending, and eigenvectors of shape (n, k), as NumPy arrays.

        Raises:
            ValueError: k below 1 or above n, ncv below k + 2, another ``which``; not converged.

        References:
            G. Gur-Ari, D. Roberts, E. Dyer, "Gradient descent happens in a tiny subspace", 2018 (the start).
        """
        self._square("eigsh")
        n = self.shape[0]
        if not 1 <= k <= n:
            raise ValueError(f"hessian: k must be in 1 … {n}; got {k!r}.")
        if which not in ("LM", "LA", "SA", "SM"):
            raise ValueError(f"hessian: which must be 'LM', 'LA', 'SA' or 'SM'; got {which!r}.")
        if ncv is not None and ncv < min(k + 2, n):
            raise ValueError(f"hessian: ncv must be at least k + 2 = {k + 2}; got {ncv!r}.")
        start = self._to_numpy(self._flatten(self.objective.gradient(self.rows), self.rows)).astype(self._precision)
        start = start / (np.linalg.norm(start) or 1.0)
        noise = stream(self.objective.seed, "eigsh").standard_normal(n)
        start += (noise / np.linalg.norm(noise)).astype(start.dtype)
        with self.objective.named_errors(), self.products() as product:
            return eigenpairs(product, start, k, which, self._tol if tol is None else tol, ncv, maxiter)

    @property
    def _precision(self) -> npt.DTypeLike:
        """Of NumPy's vectors: that of products, or float32 where these have less."""
        names = (*self.rows, *self.cols)
        return np.float64 if all(self.objective.parameters[n].dtype == "float64" for n in names) else np.float32

    @property
    def _tol(self) -> float:
        """Residual to ask of Lanczos: 0, for the accuracy of the arithmetic, only where products have it."""
        return 0.0 if self._precision is np.float64 else 1e-3

    def spectral_density(
        self, num_probes: int = 4, steps: int = 40, points: int = 512, width: float | None = None
    ) -> SpectralDensity:
        """Density of all eigenvalues by stochastic Lanczos quadrature: num_probes × steps products.

        Args:
            num_probes: random starts.
            steps: Lanczos steps each.
            points: of the grid.
            width: of the smoothing kernel; None for 1 % of the spectrum's range.
        """
        self._square("spectral_density")
        rng = stream(self.objective.seed, "density")
        starts = [rng.integers(0, 2, self.shape[0]) * 2.0 - 1.0 for _ in range(num_probes)]
        with self.products() as product:
            return spectral_density(product, starts, steps, points, width)

    def to_scipy(self, dtype: npt.DTypeLike | None = None) -> Any:
        """This block as a ``scipy.sparse.linalg.LinearOperator`` on flat NumPy vectors, with its adjoint.

        Args:
            dtype: of the vectors; None for the parameters' own, or float32 if NumPy has not that.
        """
        widest = "float64" if any(self.objective.parameters[n].dtype == "float64" for n in self.rows) else "float32"
        kind = np.dtype(widest if dtype is None else dtype)
        return linalg.LinearOperator(
            self.shape,
            matvec=lambda v: self @ np.asarray(v, kind).ravel(),
            rmatvec=lambda v: self.T @ np.asarray(v, kind).ravel(),
            matmat=lambda v: self @ np.asarray(v, kind),
            dtype=kind,
        )

    def dense(self) -> Array:
        """The block as a matrix of the framework: a product for each column."""
        arrays = self.objective.network.arrays
        return arrays.concatenate([arrays.reshape(column, (-1, 1)) for column in self._columns("columns")], axis=-1)

    def _square(self, method: str) -> None:
        if not self.is_square:
            raise ValueError(
                f"hessian: {method} needs a block with the same rows and columns; got {_some(self.rows)} × "
                f"{_some(self.cols)}."
            )

    @staticmethod
    def _value(value: float, exactness: Callable[[], Exactness]) -> Value:
        made = Value(value)
        made._exactness = exactness
        return made


def exactness_of(objective: Objective, groups: Mapping[str, Sequence[str]], exact: bool) -> dict[str, Exactness]:
    """Of the diagonal block of each group of parameters, by label."""
    return {label: Hessian(objective, names, names, exact).exactness for label, names in groups.items()}


def _some(names: Sequence[str]) -> str:
    return ", ".join(list(names)[:3]) + (f", … ({len(names)})" if len(names) > 3 else "")
