# Sourced by the scripts beside it.

# build LOG [0]: builds the extensions in place; CUDA kernels only for the GPU of this machine, unless
# CAPSOPS_CUDA_ARCHS says otherwise, or with 0 none. Shows the end of LOG where that fails.
build() {
    local log=$1
    export CAPSOPS_BUILD_CUDA=${2:-1}
    if [[ $CAPSOPS_BUILD_CUDA == 1 ]]; then
        command -v nvcc >/dev/null || export PATH=$PATH:/usr/local/cuda/bin
        if [[ -z ${CAPSOPS_CUDA_ARCHS:-} ]]; then
            CAPSOPS_CUDA_ARCHS=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
            export CAPSOPS_CUDA_ARCHS
        fi
    fi
    "$python" setup.py build_ext --inplace >"$log" 2>&1 || { tail -30 "$log" && exit 1; }
    echo "built in $SECONDS s${CAPSOPS_CUDA_ARCHS:+ for $CAPSOPS_CUDA_ARCHS}"
}
