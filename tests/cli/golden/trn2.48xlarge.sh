# trn2.48xlarge on 1 x trn2.48xlarge: process 0 of 1 (from nothing but the
#   topology)

# Neuron first; the host's CPU initialises parameters and samples text
#   (aws-neuron-sdk 2.32.0 frameworks/jax/setup/jax-neuronx-known-issues.rst)
export JAX_PLATFORMS=neuron,cpu

# Threefry is not fully supported; the compiler takes RNG_DEFAULT only
#   (aws-neuron-sdk 2.32.0 frameworks/jax/setup/jax-neuronx-known-issues.rst)
export JAX_DEFAULT_PRNG_IMPL=rbg

# programs without collectives are compiled for the CPU, in seconds; the
#   training step has collectives (aws-neuron-sdk 2.32.0
#   frameworks/jax/api-reference-guide/neuron-envvars.rst)
export NEURON_RUN_TRIVIAL_COMPUTATION_ON_CPU=1

# physical cores in a logical one, hence 64 devices an instance; as --lnc below
#   (aws-neuron-sdk 2.32.0
#   about-neuron/arch/neuron-features/logical-neuroncore-config.rst)
export NEURON_LOGICAL_NC_CONFIG=2

# options of neuronx-cc 2.28.7631.0; -O1 as AWS trains JAX models
#   (aws-neuron-sdk 2.32.0 compiler/neuronx-cc/api-reference-guide/index.rst)
export NEURON_CC_FLAGS='--target=trn2 --lnc=2 --model-type=transformer -O1'

# the compiler's own cache below is the only one: JAX's ends programs (measured
#   by others on inf2, jax 0.9.2 with libneuronxla 3.0.3854: 'No program shape
#   found' at start)
export JAX_ENABLE_COMPILATION_CACHE=false

# compile once for all runs; a shared path or s3:// serves all hosts
#   (aws-neuron-sdk 2.32.0 frameworks/torch; AWS's scripts for JAX set it too)
export NEURON_COMPILE_CACHE_URL=/home/user/.cache/trainfw/neuron

# seconds a step may take; documents differ on the default (aws-neuron-sdk
#   2.32.0 neuron-runtime/guides/configuration-guide.rst)
export NEURON_RT_EXEC_TIMEOUT=600

# XLA's own warnings are not for users of recipes (trainfw, on every backend)
export TF_CPP_MIN_LOG_LEVEL=2

# experimental: order tensor's and FSDP's collectives to overlap compute
#   (aws-neuron-sdk 2.32.0 neuron-runtime/explore/compute-comm-overlap.rst)
export NEURON_FSDP=1

# experimental: gather parameters this many layers ahead (aws-neuron-sdk 2.32.0
#   neuron-runtime/explore/compute-comm-overlap.rst)
export NEURON_FSDP_NUM_LAYER_EARLY_AG_SHIFT=1

# experimental: scatter gradients this many layers later (aws-neuron-sdk 2.32.0
#   neuron-runtime/explore/compute-comm-overlap.rst)
export NEURON_FSDP_NUM_LAYER_LATE_RS_SHIFT=2

# experimental: tensor's collectives on stream 0, FSDP's on stream 1
#   (aws-neuron-sdk 2.32.0 neuron-runtime/explore/compute-comm-overlap.rst)
export NEURON_FSDP_CC_MULTISTREAM=1

# experimental: bytes: compute's transfers before FSDP's (aws-neuron-sdk 2.32.0
#   neuron-runtime/explore/compute-comm-overlap.rst)
export NEURON_RT_DBG_DMA_PACKETIZATION_SIZE=65536

# experimental: bytes by stream: tensor's before compute's before FSDP's
#   (aws-neuron-sdk 2.32.0 neuron-runtime/explore/compute-comm-overlap.rst)
export NEURON_RT_DBG_CC_DMA_PACKET_SIZE=65536,4096
