"""What one equation of a trace costs, by the name of its primitive.

A comparison is an addition; a division, a root or a transcendental function is a multiplication.
A negation, a magnitude, a selection and the operations of logic are free, as is moving data.
"""

import math
from typing import Any

# Data is moved, copied or cast, bits are flipped, one of two values is taken.
FREE = {
    "abs", "and", "bitcast_convert_type", "broadcast_in_dim", "concatenate", "convert_element_type",
    "copy", "copy_p", "device_put", "dynamic_slice", "dynamic_update_slice", "gather", "iota",
    "neg", "not", "optimization_barrier", "or", "pad", "pcast", "pvary", "real", "reduce_and",
    "reduce_or", "reduce_precision", "reshape", "rev", "scatter", "select_n",
    "sharding_constraint", "shift_left", "shift_right_arithmetic", "shift_right_logical", "slice",
    "split", "squeeze", "stop_gradient", "transpose", "xor",
}  # fmt: skip
# One for each number that is given out.
ADDITIONS = {
    "add", "add_any", "ceil", "cummax", "cummin", "cumsum", "eq", "floor", "ge", "gt", "is_finite",
    "le", "lt", "max", "min", "ne", "round", "sign", "sub",
}  # fmt: skip
MULTIPLICATIONS = {
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cos", "cosh", "cumprod",
    "div", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "log", "log1p", "logistic", "mul",
    "pow", "rem", "rsqrt", "sin", "sinh", "sqrt", "square", "tan", "tanh",
}  # fmt: skip
ADDING_REDUCTIONS = {"argmax", "argmin", "reduce_max", "reduce_min", "reduce_sum"}
WINDOWS = {"reduce_window_max", "reduce_window_min", "reduce_window_sum"}
POOLS = ADDING_REDUCTIONS | WINDOWS | {"reduce_prod"}


def terms(equation: Any) -> tuple[int, int, int] | None:
    """Multiplications, additions and XNORs of a convolution or matrix product; None of others.

    Padded places count, as in publications; zeros that an input dilation puts between pixels do
    not. An adder takes a subtraction and an addition a term. The scale of one-bit filters is not
    counted: a factor a channel, which the BatchNorm behind them takes in.
    """
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        each = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    elif name == "conv_general_dilated":
        _, *others = parameters["dimension_numbers"].rhs_spec
        each = math.prod(equation.invars[1].aval.shape[axis] for axis in others)
    elif name in ("conv_forward", "adder_forward", "binary_forward"):
        each = math.prod(equation.invars[1].aval.shape[:3])
    else:
        return None
    number = equation.outvars[0].aval.size * each
    number //= math.prod(parameters.get("lhs_dilation", ()))
    if name == "adder_forward":
        return 0, 2 * number, 0
    return (0, number, number) if name == "binary_forward" else (number, number, 0)


def operations(equation: Any) -> tuple[int, int] | None:
    """Multiplications and additions of any other equation; None if its primitive is unknown.

    A sum or maximum of n numbers takes n - 1 additions, whether it is of a window, in which padded
    places count, or of an axis.
    """
    name, parameters = equation.primitive.name, equation.params
    out = equation.outvars[0].aval.size
    read = max((math.prod(v.aval.shape) for v in equation.invars), default=0)
    if name in FREE:
        return 0, 0
    if name in ADDITIONS:
        return 0, out
    if name in MULTIPLICATIONS:
        return out, 0
    if name == "integer_pow":
        power = abs(parameters["y"])
        return out * max(1, power.bit_length() + power.bit_count() - 2), 0
    if name == "clamp":
        return 0, 2 * out
    if name == "scatter-add":
        return 0, math.prod(equation.invars[2].aval.shape)
    if name in WINDOWS:
        return 0, out * (math.prod(parameters["window_dimensions"]) - 1)
    if name in ADDING_REDUCTIONS:
        return 0, read - out
    return (read - out, 0) if name == "reduce_prod" else None
