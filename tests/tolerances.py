"""Bounds of what must agree between backends and libraries, each with the measurement behind it.

Measured in float32 on a CPU (Linux x86-64, MLX 0.32.4 and torch 2.13.0): random 2-layer Llama, Mistral and Qwen2
models with tied and untied heads, TinyStories-656K and stories260K; LoRA of rank 8 on all linear layers, with and
without dropout 0.1, 8 rows an update. Never loosened to get green.
"""

# Loss of the first update, MLX against PyTorch, relative.
FIRST_LOSS = 1e-6  # measured: 3.5e-7 (qwen2, tied head)

# Every element of the first update's adapter gradient, relative to the largest of all.
GRADIENTS = 2e-5  # measured: 1.4e-6 (TinyStories-656K)

# Norm of the first gradient module by module, each relative.
GRADIENT_NORMS = 1e-5  # measured: 4.8e-7 (LoRA with dropout 0.1, a 2-layer Llama)

# Loss of each of 50 updates, relative.
CURVE = 1e-4  # measured: 5.5e-7 (llama, tied head)

# One update cut into k micro-batches against one, same backend, relative: loss, and norm of the gradient's change.
MICRO = 1e-6  # measured: 4.9e-7 for the loss (qwen2 on MLX), 4.2e-7 for the gradient (stories260K on PyTorch), of a
# single element 7.6e-7 of the largest, of the adapter after it, where |g| is not near AdamW's eps, 1e-8

# The first update compiled by torch.compile against plain, norm of the change: its sums have another order.
COMPILED_TORCH = 1e-5  # measured: 5.3e-6, where gradients differ by 2.0e-6 of the largest; AdamW divides by |g|

# Logits of one adapter folder here, in PEFT and in mlx-lm, absolute with the largest logit scaled to 10.
LOGITS = 2e-5  # measured: 0 to PEFT (bit-equal), 1.5e-5 between our backends, 1.8e-5 to mlx-lm (stories260K)

# Summed loss of the chunked head against float64, relative, over 3 chunks of a vocabulary of 40,000.
LOSS_LAYER = 2e-6  # measured: 1.4e-6 (MLX, soft-cap 10: its float32 tanh and exp), 3e-7 without a soft-cap

# The same over a vocabulary of 130,001 in one chunk.
LOSS_VOCABULARY = 2e-7  # measured: 2e-8

# Ten AdamW updates on the same gradients, |one - other| / |movement|, MLX against PyTorch.
OPTIMIZER = 1e-5  # measured: 1.0e-6

# Ten updates of every other optimizer against its formula in float64, |one - other| / |other|, and / |movement|.
TRAJECTORY = 1e-6  # measured: 2.2e-7 (Lion)
MOVEMENT = 1e-4  # measured: 5.3e-5 (Lion at rate 1e-3, whose movement is small), 9.3e-6 for the rest

# Loss, gradient norm and gradient of an update in float16 against float32, relative.
FLOAT16 = 1e-2  # measured: 1.1e-5, 3.5e-4 and 2.1e-3

# Ten updates of Muon's formula against torch.optim.Muon, which iterates in bfloat16, |one - other| / |movement|.
BFLOAT16_MUON = 0.02  # measured: 5.1e-3

# The same with moments in 8 bits: MLX, PyTorch, and the float64 reference with the codec.
OPTIMIZER_8BIT = 1e-3  # measured: 2.9e-4 where one code in 7,000 differs, 4.4e-6 where none does

# Share of 8-bit codes that differ behind them, each by one step: values within a rounding of a midpoint.
CODES = 1e-3  # measured: 1.4e-4

# The same distance from 8-bit AdamW to bitsandbytes' on a CPU, gradients within a decade.
BITSANDBYTES = 0.01  # measured: 4.1e-3; both are 1.9e-2 from float32

# The same distance from 8-bit to float32 moments, gradients of three decades.
EIGHT_BITS = 0.1  # measured: 6.9e-2; bitsandbytes on a CPU: 0.24
# Estimated peak of a run against the real one, relative: MLX's own count, and the size of the process with torch.
ESTIMATE = 0.10  # measured: +5.1 % (MLX, 1024 tokens), +0.3 % (PyTorch); all cases by benchmarks/memory.py

# Attention in bfloat16 against the same in float32, outputs and gradients, relative to the largest of each.
HALF_ATTENTION = 0.03  # measured: 1.1e-2 for the loop over examples, on a CPU
# Packed and sorted micro-batches against one padded batch, same backend, relative: loss, and norm of the change of
# the gradient.
LAYOUT = 1e-6  # measured: 3.2e-7 for the loss, 8.8e-7 for the gradient

# The same change of the gradient on every architecture of docs/architectures.md.
LAYOUT_ARCHITECTURES = 2e-6

# The same for every element of the gradient, relative to the largest of all.
LAYOUT_ELEMENT = 2e-6  # measured: 1.2e-6 (llama with wide heads on MLX, attention in blocks against MLX's own)

# The same for the norm of the adapter's change behind AdamW's first step from the standard start.
LAYOUT_ADAPTER = 5e-6  # measured: 3.0e-6: AdamW divides by gradients near its eps

# Attention and its gradients against float64, relative to the largest element or absolute below 1; inputs of unit size.
ATTENTION = 2e-6
ATTENTION_BF16 = 1e-2

# Outputs and gradients of layers with low-rank products against float64, relative to the largest element.
LOWRANK = 2e-6

# Loss of bfloat16 hidden states and head against float64 of the same words, relative; elements of its gradient.
LOSS_BF16 = 1e-3
LOSS_GRADIENT_BF16 = 2e-2

# Logits of a GGUF file in llama.cpp against transformers, float32 weights and cache, relative to the largest.
LLAMA_CPP = 1e-5  # measured: 1.2e-6 (linear rope)
LLAMA_CPP_GELU = 2e-3  # measured: 5.6e-4 (Gemma 3; llama.cpp takes GELU from a table in float16)

# Low-rank changes of combined adapters against PEFT's and the exact sum, relative to the largest element: float32.
COMBINED = 5e-6  # measured: 2.4e-6 (svd of rank 3, torch's in float32)
