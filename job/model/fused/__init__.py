"""Fused layers: a Llama decoder layer with LoRA as one operation with a hand-written backward pass. Start reading here.

    layer.py       one decoder layer: forward pass, backward pass, and what is kept in between
    products.py    the linear layers that share an input, computed as one product together with their adapters
    frozen.py      their frozen weights in 16, 8 or 4 bits, and copies of the adapters around or beside them
    attention.py   attention without autograd; attention_kernels.py is our own implementation, for Hopper
    pointwise.py   everything between the products. Its PyTorch lines specify triton_kernels.py and gate_kernels.py
    head.py        the loss over the frozen head
    workspace.py   buffers that all layers of a model share
    rounding.py    rows in 8-bit floats
    launch.py      cheap launches of Triton kernels
    proof.py       the check that fused layers give the model's own results on this machine
    judge.py       the plain formulas in float32 that the check compares with

The bordered product
    A linear layer with an adapter computes y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ. With a = A and b = s·B around the frozen weights W,
    and x·aᵀ written beside x, one product gives the whole sum. The same matrix serves the backward pass:

                    inputs     ranks                           inputs      ranks
                  +----------+-------+                       +-----------+---------+
        outputs   |    W     |   b   |              tokens   |     x     |  x·aᵀ   |     = the wide input
                  +----------+-------+                       +-----------+---------+
        ranks     |    a     |   0   |                         outputs     ranks
                  +----------+-------+                       +-----------+---------+
                                                    tokens   |   of_y    | of_y·b  |     = the wide gradient
                                                             +-----------+---------+

        forward    wide input    · (W, b)ᵀ  =  x·Wᵀ + (x·aᵀ)·bᵀ    =  y       the upper rows of the matrix
        backward   wide gradient · (W; a)   =  of_y·W + (of_y·b)·a  =  of_x    its left columns

    No product reads the zeros in the corner. Several layers stack their W and their a, and their b form a block
    diagonal. Two adapted layers (gate and up) would therefore multiply as many zeros as values of b. So the first
    adapter's columns go to the left, and each layer multiplies with its own columns only. This needs a ranks₁ that is a
    multiple of 8, to keep the columns aligned to 16 bytes:

                    ranks₁   inputs   ranks₂                       ranks₁   inputs   ranks₂
                  +--------+--------+--------+                   +--------+--------+--------+
        outputs₁  |   b₁   |   W₁   |   0    |          tokens   | x·a₁ᵀ  |   x    | x·a₂ᵀ  |
                  +--------+--------+--------+                   +--------+--------+--------+
        outputs₂  |   0    |   W₂   |   b₂   |
                  +--------+--------+--------+          y₁ = (x·a₁ᵀ, x) · (b₁, W₁)ᵀ
        ranks     |   0    | a₁; a₂ |   0    |          y₂ = (x, x·a₂ᵀ) · (W₂, b₂)ᵀ
                  +--------+--------+--------+          of_x = (of_y₁, of_y₂, of_y₁·b₁, of_y₂·b₂) · (W₁; W₂; a₁; a₂)

Names
    of_x       ∂L/∂x, the gradient of x; so of_y, of_a, of_gate, …
    narrow     x·Aᵀ, or dropout(x)·Aᵀ: (tokens, ranks), narrow beside x
    border     the extra columns of an input or an output, one per rank; `before` of them lie to the left of an input
    wide       a tensor that has its border (in kernels: a value in float32)
    kept       what the backward pass needs. A layer that is not kept is recomputed (gradient checkpointing)
    rounded    the same values again in 8-bit floats, with a scale per row; written to, like `out`
    out, outs  tensors that a function writes its results to
    part       one piece of a tensor: one layer's rows of W, or in kernels one stretch of a dimension. Each stretch is
               summed by one program, and the partial sums are added in a fixed order
    seeds      a `Draw` per linear layer: dropout's seed, and the tokens' place in the batch
    moment     a tensor that is added to both when a kernel runs, so that a captured pass drops other values each time
    act        silu(gate) · up, the result of the gate; gate_up is its input, gate and up side by side
    shared     heads of keys and values, which several query heads may share
    name_      an argument that the function may overwrite, if only its border. The function's name ends in `_` too.
               `out`, `outs` and `rounded` need no mark. Kernels have none: the comment above each says what it writes

Shapes
    tokens     all rows of a micro-batch one after another, without padding. They are dimension 0 of every activation
    x, y       (tokens, inputs) and (tokens, outputs), outputs and ranks being sums over the layers of a product
    W, a, b    (outputs, inputs), (ranks, inputs), (outputs, ranks)
    packed     (tokens, (heads + 2 · shared) · head_dim): queries, keys and values side by side
    gate_up    (tokens, 2 · n), n being the model's intermediate size; act: (tokens, n)
    Rounded    values (tokens, columns) in e4m3, scales (tokens, 1) in float32

Tricks, and why
    The border. The product adds the adapters' term in float32 and rounds the sum once. Added separately, the term would
        cost one more pass that reads and writes all of y.
    The gradient left in a wider tensor. Autograd hands a layer only of_out, but the next product needs a border beside
        it. So each layer writes of_x into a tensor that has room, and `Workspace` finds that tensor again. That saves a
        copy per layer.
    Dropout drawn again from a seed. A stored mask would take memory and a pass. A seed and the token's place give the
        same mask in the backward pass, in a recomputed layer, in smaller micro-batches and after a resume.
    Recomputed layers. They keep their input and `down`'s narrow product, and repeat the forward pass except for the
        product of `down`, whose result no gradient needs. The planner chooses how many layers trade time for memory.
    The head without the logits of all tokens. They would be the largest tensor of a step. The gradient of a label's
        log-probability is onehot - p, so it goes back through the head while the logits of 4,096 tokens exist. The
        backward pass then needs no logits, which is one product fewer than recomputing them.
    Dequantizing into a shared matrix. 4-bit weights are dequantized for each product into one matrix per shape, which
        all layers share. So they take the memory of 4 bits, but use the same bordered product as 16-bit weights.
    Norms that are not kept. Their input, one factor per row and the weight give the gradient of A; see `Normed`.
"""

MANY_TOKENS = 4096  # from here on some kernels load by descriptors, each of which costs the host about 40 µs
