# trn1.32xlarge-x32 on 32 x trn1.32xlarge: process 31 of 32 (from Slurm)

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

# where the runtimes meet for collectives: process 0 (aws-neuron-sdk 2.32.0
#   neuron-runtime/guides/nrt-developer-guide.rst)
export NEURON_RT_ROOT_COMM_ID=trn1-01:41000

# devices of each process: one process an instance (aws-neuron-sdk 2.32.0
#   frameworks/jax/api-reference-guide/neuron-envvars.rst)
export NEURON_PJRT_PROCESSES_NUM_DEVICES=32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32,32

# this process, numbered by Slurm (aws-neuron-sdk 2.32.0
#   frameworks/jax/api-reference-guide/neuron-envvars.rst)
export NEURON_PJRT_PROCESS_INDEX=31

# libfabric's provider between instances (aws-neuron-sdk 2.32.0
#   frameworks/torch/torch-neuronx/setup-trn1-multi-node-execution.rst)
export FI_PROVIDER=efa

# RDMA to and from device memory (aws-neuron-sdk 2.32.0
#   frameworks/torch/torch-neuronx/setup-trn1-multi-node-execution.rst)
export FI_EFA_USE_DEVICE_RDMA=1

# options of neuronx-cc 2.28.7631.0; -O1 as AWS trains JAX models
#   (aws-neuron-sdk 2.32.0 compiler/neuronx-cc/api-reference-guide/index.rst)
export NEURON_CC_FLAGS='--target=trn1 --model-type=transformer -O1'

# compile once for all runs (JAX 0.10, jax-ml/jax pull request 23741)
export JAX_COMPILATION_CACHE_DIR=/home/user/.cache/trainfw/jax

# the compiler's own cache; a shared path or s3:// serves all hosts
#   (aws-neuron-sdk 2.32.0 frameworks/torch; AWS's scripts for JAX set it too)
export NEURON_COMPILE_CACHE_URL=/home/user/.cache/trainfw/neuron

# seconds a step may take; documents differ on the default (aws-neuron-sdk
#   2.32.0 neuron-runtime/guides/configuration-guide.rst)
export NEURON_RT_EXEC_TIMEOUT=600

# XLA's own warnings are not for users of recipes (trainfw, on every backend)
export TF_CPP_MIN_LOG_LEVEL=2

# experimental: overlap FSDP's collectives in scanned layers (rahul003/axlearn
#   05907108 launch scripts, third party; AWS does not document it)
export NEURON_FSDP_REPEATED=1
