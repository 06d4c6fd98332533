"""Every tolerance of the tests, with its reason. Codes have none: they are compared by profit_kernels.testing."""

import torch

# Golden gradients: the authors' code sums in float32 in another order (shared golden vectors ask for rtol 1e-5).
GOLDEN_GRAD = {"rtol": 1e-5, "atol": 1e-5}
# Golden convolutions: float32 sums of up to 54 products in another order.
GOLDEN_CONV = {"rtol": 1e-5, "atol": 2e-6}
# Element-wise gradient in float32 against float64: a handful of roundings.
GRAD_ELEMENT = {"rtol": 1e-5, "atol": 1e-6}
# The same with a bfloat16 or float16 result: one rounding to the output's dtype.
GRAD_ELEMENT_HALF = {"bfloat16": {"rtol": 2**-7, "atol": 2**-10}, "float16": {"rtol": 2**-10, "atol": 2**-13}}
# Interval gradients: float32 sums over up to 1e5 terms of mixed sign, relative to the sum of their magnitudes.
INTERVAL_GRAD_OF_MAGNITUDE = 3e-6
# KL per channel against float64 numpy: the result is float32.
KL = {"rtol": 1e-6, "atol": 1e-10}
# The same of outputs that have nothing to do with each other, where var_new - var_old = Var(d) + 2 Cov(d, old) cancels: a few
# roundings of 2^-24 in r - 1, times the (r - 1) / 2 that KL grows with.
KL_UNRELATED = {"rtol": 1e-6, "atol": 1e-8}
# The golden KL has no epsilon on the variance (ours is 1e-12) and comes from outputs stored in float32.
GOLDEN_KL = {"rtol": 1e-4, "atol": 1e-9}
# Two float32 convolutions of one definition whose sums run in another order.
CONV = {"rtol": 1e-5, "atol": 1e-5}
# The same, relative to the sum of the magnitudes of the terms: k * k products, or N * H * W of them for a weight. 33 roundings.
CONV_OF_MAGNITUDE = 2e-6
# Results in a half precision, in the backward after an intermediate of that precision: two roundings.
HALF_OF_MAGNITUDE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Sums over a whole map in float32 (weight and bias gradients), relative to the sum of the magnitudes of their terms.
MAP_SUM_OF_MAGNITUDE = 1e-6
# The same convolutions with a bfloat16 or float16 result: one rounding to the output's dtype, on values of order 1.
CONV_HALF = {torch.bfloat16: {"rtol": 2**-8, "atol": 2**-10}, torch.float16: {"rtol": 2**-11, "atol": 2**-13}}
CONV64 = {"rtol": 1e-12, "atol": 1e-12}
# The same formula through autograd and spelled out: element-wise a few roundings; sums of 360 terms of mixed sign.
TEXTBOOK = {torch.float32: {"rtol": 2e-5, "atol": 2e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}
# An output against code * step + offset: 2 ulp of float32, or one rounding to the output's own dtype (values up to about 8).
GRID = {
    torch.float64: {"rtol": 1e-14, "atol": 1e-14},
    torch.float32: {"rtol": 3e-7, "atol": 3e-7},
    torch.bfloat16: {"rtol": 2**-8, "atol": 2**-9},
    torch.float16: {"rtol": 2**-11, "atol": 2**-12},
}
# KL between two float32 convolutions that torch may sum in another order than the operator.
KL_CONV = {"rtol": 1e-4, "atol": 1e-7}
# The same where channels hardly vary or terms cancel, in roundings of the terms (tests/ops/aiwq/closeness.py). Up to 9
# roundings of the outputs themselves were seen in 1200 layers, most from float32 moments of the input.
KL_ROUNDINGS = 32
# KL_CONV where the old output is rounded to bfloat16: a value may round the other way, a part in 2^9 of it, in either sum.
KL_CONV_HALF = {"rtol": 1e-3, "atol": 1e-5}
# Places in a report's SVG, in pixels: matplotlib writes six decimals, and snaps bars to half a pixel when it draws them.
SVG_PIXELS = 0.01
# softplus of its inverse in float32: the raw value has the spacing of float32 around log(value), which softplus passes on.
SOFTPLUS = {"rtol": 2e-6, "atol": 0}
# Relative L2 error of one layer at 8 bits against itself in full precision, ranges by maximum. The step is max/127 or max/255,
# the error step/sqrt(12), and a layer's input peaks at 4 to 15 times its RMS: at most 3%, measured below 2%.
EIGHT_BIT_LAYER = 0.04
# Full precision, activation and BatchNorm inside the layers against the modules they replace: roundings in up to 64 layers, on
# outputs of order 1. Against float64 either way is off by up to 6e-5 (measured, mobilenetv2_050, batch of 2 at 64 px).
FUSED_ACTIVATION = {"rtol": 1e-4, "atol": 3e-4}
# Mean cross-entropy in float32 against float64, and learning rates that pass through float32.
LOSS = {"rtol": 1e-5, "atol": 1e-6}
# A few steps of an exponential average in float32 against float64.
AVERAGE = {"rtol": 1e-5, "atol": 1e-6}
# Activations behind a few layers, computed in float32 against numpy in float64, relative to the largest.
PERCENTILE = 1e-5
CALIBRATED = {"rtol": 1e-3, "atol": 0}
# A 90% quantile of a uniform distribution on [0, 1] from a random part of 1e4 values: standard error 3e-3, five of them.
SUBSAMPLED_QUANTILE = 0.015
# The GPU against the reference there and in float64 on the CPU, relative L2. Sums in another order are 1e-6; a code that a
# rounding edge flips moves one value of a thousand by a fifteenth (2e-3). In bfloat16 / float16 each value is rounded to 8 / 11
# bits, and the reference in float64 is not.
DEVICE_L2 = {torch.float32: 5e-3, torch.bfloat16: 2e-2, torch.float16: 6e-3}
# Interval gradients, per root of the number of terms (about 1000): a flipped code moves one term of order 1 by a fifteenth,
# 2e-3; half precision rounds the upstream gradient of a fused layer (seen: 2e-5, 6e-3, 1.3e-3).
DEVICE_INTERVAL = {torch.float32: 5e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# A training step of a small net in float32 against float64, relative L2 of each gradient: a flipped code moves all behind it.
DEVICE_STEP = 0.05
# Eager against compiled, float32: the compiler fuses, so sums and products round in another order.
COMPILED = {"rtol": 1e-4, "atol": 1e-5}
# Mean, variance and 1 / deviation of a channel, float32 from sums in float64: one rounding, and what a mean of 1000 deviations
# costs a variance taken as a difference in float64.
MOMENTS = {"rtol": 2e-7, "atol": 1e-9}
# A whole block in float32 against torch's own functions, in L2, relative: BatchNorm is evaluated in another order, so that a
# code in about 1e5 may be one step apart, of 500 to 1000 values in these cases. A missing term shows in the first digit.
BLOCK_RELATIVE = 0.02
# A few training steps in float64, BatchNorm evaluated in another order: roundings of 1e-16, grown by the steps.
FUSED_TRAINING = {"rtol": 1e-8, "atol": 1e-10}
# The same in float32 with 4-bit codes: a code in about 1e5 falls on the other side of an edge, and moves later steps.
FUSED_LOSS = 0.02
# AIWQ in float32 where nothing changed: the outputs are the same numbers but for the order of a convolution's sums.
KL_OF_NOTHING = 1e-9
# Two processes against one in float64: sums in another order, over a few steps of training; the scores pass through float32.
PROCESSES = {"rtol": 1e-6, "atol": 1e-9}
# KL in half precision against a layer's old output whose sums run in another order: a few single outputs are off by a unit in
# the last place.
KL_CONV_KERNEL = {
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-5},
    torch.float16: {"rtol": 5e-3, "atol": 1e-6},
}
# KL with identical weights: the order of summation alone, in the dtype of the outputs.
KL_SAME_WEIGHT = {torch.float32: 1e-11, torch.bfloat16: 1e-5, torch.float16: 1e-7}
# KL of a channel that died: the reference's 1 + (r - 1) keeps four digits of r = eps / var_old = 1e-12, of 28 in -ln r.
KL_DIED = {"rtol": 1e-5, "atol": 0}
# The integer runtime in float64 against the model in float64: integers times a scale, and float sums of up to a few hundred
# products; what is left is the rounding of float64.
EXPORT_CONV64 = {"rtol": 1e-9, "atol": 1e-9}
# The same in float32 where a code at an edge may turn over: one step of an 8-bit code moves an output of order 1 by below 0.05.
EXPORT_FLOAT32_LOGITS = {"rtol": 0.02, "atol": 0.05}
# onnxruntime in float32 against the runtime in float64, all codes equal: float sums between the layers and in the last one.
EXPORT_FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}
# A linear layer of integers, of outputs up to 1.5: a product with a float32 scale and a sum with a float32 bias.
ONNX_LINEAR = {"rtol": 0, "atol": 1e-6}
# One operator in onnxruntime against PyTorch in float32, behind and in front of a 1x1 convolution.
ONNX_OPERATOR = {"rtol": 1e-5, "atol": 1e-5}
# Logits of a converted network in full precision, relative L2: BatchNorm inside the consumer rounds in another order, and a
# deep random network amplifies that (measured 3e-5).
CONVERTED_NETWORK = 5e-4
# The worst layer of any model of the zoo, likewise: 5% measured, where an input's peak is far above its RMS.
EIGHT_BIT_WORST_LAYER = 0.08
# Logits of a random network at 8 bits against its error under noise of one step in every weight and input: one draw of each,
# and chaos decides which is larger (measured 0.1 to 1.2).
EIGHT_BIT_OVER_NOISE = 2.0
