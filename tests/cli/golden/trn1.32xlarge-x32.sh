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

# experimental: the EFA plugin's protocol (AWS's scripts for AXLearn,
#   rahul003/axlearn 05907108; AWS does not document it)
export OFI_NCCL_PROTOCOL=RDMA

# experimental: the EFA plugin keeps no cache of memory registrations (AWS's
#   scripts for AXLearn, rahul003/axlearn 05907108; AWS does not document it)
export OFI_NCCL_MR_CACHE_DISABLE=1

# experimental: where EFA's installer puts libfabric, which pods may not know
#   of; counts where it is set before Python starts (AWS's scripts for AXLearn,
#   rahul003/axlearn 05907108; AWS does not document it)
export LD_LIBRARY_PATH=/opt/amazon/efa/lib"${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

# experimental: tcmalloc for the host's memory (libgoogle-perftools4 of Ubuntu,
#   gperftools-libs of Amazon Linux); counts where it is set before Python
#   starts (AWS's scripts for AXLearn, rahul003/axlearn 05907108; AWS does not
#   document it; AWS's tutorial for AXLearn requires it)
# LD_PRELOAD is not known here

# options of neuronx-cc 2.28.7631.0; -O1 as AWS trains JAX models
#   (aws-neuron-sdk 2.32.0 compiler/neuronx-cc/api-reference-guide/index.rst)
export NEURON_CC_FLAGS='--target=trn1 --model-type=transformer -O1'

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

# experimental: overlap FSDP's collectives in scanned layers (rahul003/axlearn
#   05907108 launch scripts, third party; AWS does not document it)
export NEURON_FSDP_REPEATED=1
