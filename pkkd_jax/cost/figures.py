"""The figures of a layer and of a network, and what its operations take in energy."""

import dataclasses
from functools import reduce

from pkkd_jax.names import unknown

# Precision to pJ of one multiplication and of one addition in 45 nm at 0.9 V: Horowitz, Computing's
# energy problem (and what we can do about it), ISSCC 2014, Fig. 1.1.9.
ENERGY_PJ = {
    "float32": (3.7, 0.9),
    "float16": (1.1, 0.4),
    "int32": (3.1, 0.1),
    "int8": (0.2, 0.03),
}
# Of one bit, which that table has not: an eighth of an addition of eight bits, an estimate.
XNOR_PJ = ENERGY_PJ["int8"][1] / 8
COLUMNS = ("norm", "pool", "activation", "sum")


@dataclasses.dataclass(frozen=True)
class Operations:
    """Numbers of multiplications and of additions."""

    mul: int = 0
    add: int = 0

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(self.mul + other.mul, self.add + other.add)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer with a convolution or a matrix product, and what follows until the next one.

    Attributes:
      name: path of its module in the network; "input" for what stands before the first layer.
      mul, add, xnor: operations of the convolution or product, bias included.
      norm: those of modules whose class is called `...Norm`.
      pool: of windows and reductions elsewhere.
      activation: of other functions of each element.
      sum: of additions of two feature maps.
      params: parameters that no layer above has used.
      activations: numbers that the convolution or product gives out.
    """

    name: str
    mul: int = 0
    add: int = 0
    xnor: int = 0
    norm: Operations = Operations()
    pool: Operations = Operations()
    activation: Operations = Operations()
    sum: Operations = Operations()
    params: int = 0
    activations: int = 0

    def __add__(self, other: "Layer") -> "Layer":
        fields = [field.name for field in dataclasses.fields(self) if field.name != "name"]
        both = {name: getattr(self, name) + getattr(other, name) for name in fields}
        return Layer(self.name, **both)

    def energy_pj(self, precision: str = "float32", layers_only: bool = False) -> float:
        """Energy of the arithmetic in pJ; memory traffic is not included.

        Args:
          precision: a key of `ENERGY_PJ`, of every multiplication and addition alike.
          layers_only: whether norm, pool, activation and sum are left out.
        Raises:
          UserError: for an unknown precision.
        """
        if precision not in ENERGY_PJ:
            raise unknown("precision", precision, ENERGY_PJ)
        parts = [] if layers_only else [getattr(self, column) for column in COLUMNS]
        done = sum(parts, Operations(self.mul, self.add))
        of_mul, of_add = ENERGY_PJ[precision]
        return done.mul * of_mul + done.add * of_add + self.xnor * XNOR_PJ


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one image costs a network.

    Attributes:
      layers: in the order in which they are first computed; parameters that nothing uses stand in
        a last one, "unused".
      not_counted: primitives of JAX that compute something of the image and are not in the figures.
    """

    layers: tuple[Layer, ...]
    not_counted: tuple[str, ...] = ()

    @property
    def total(self) -> Layer:
        """The sum of all layers."""
        return reduce(Layer.__add__, self.layers, Layer("total"))

    def energy_pj(self, precision: str = "float32", layers_only: bool = False) -> float:
        """`Layer.energy_pj` of the total."""
        return self.total.energy_pj(precision, layers_only)
