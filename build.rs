//! Compiles the CUDA kernels, with the feature `cuda`; without it there is nothing to do.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    cuda::build()?;
    Ok(())
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::error::Error;
    use std::path::PathBuf;

    /// Builds `cuda/*.cu` into a static library: machine code for the GPU that `CUDA_COMPUTE_CAP` names (90 is sm_90a),
    /// or else the one that nvidia-smi finds, and PTX from which newer GPUs make theirs.
    pub fn build() -> Result<(), Box<dyn Error>> {
        println!("cargo::rerun-if-env-changed=CUDA_COMPUTE_CAP");
        println!("cargo::rerun-if-env-changed=NVCC");
        let arch = cudaforge::detect_compute_cap().map_err(|error| {
            format!(
                "feature `cuda`: for which GPU? Set CUDA_COMPUTE_CAP, for example to 90 for an H100 or 80 for an A100 \
                 ({error})"
            )
        })?;
        if arch.base() < 75 {
            return Err(format!("feature `cuda`: expected CUDA_COMPUTE_CAP of 75 or more, found {arch}").into());
        }
        let out = PathBuf::from(std::env::var("OUT_DIR")?);
        let sources = [
            "decode.cu",
            "decode_cluster.cu",
            "decode_direct.cu",
            "decode_hopper.cu",
            "decode_hopper_f32.cu",
            "decode_portable.cu",
            "decode_resident.cu",
            "decode_wide.cu",
            "elementwise.cu",
            "gemm.cu",
            "gemm_ampere.cu",
            "gemm_ampere_bf16.cu",
            "gemm_ampere_f16.cu",
            "gemm_hopper_bf16.cu",
            "gemm_hopper_f16.cu",
            "gemm_hopper_f32.cu",
        ];
        let ptx = format!("-gencode=arch=compute_{0},code=compute_{0}", arch.base());
        cudaforge::KernelBuilder::new()
            .source_files(sources.map(|name| PathBuf::from("cuda").join(name)))
            .watch(["cuda"])
            .args(["-std=c++17", "-O3", &ptx])
            .build_lib(out.join("libcandle_fused_mlp_cuda.a"))
            .map_err(|error| {
                format!("feature `cuda`: the kernels need CUDA's compiler nvcc, in PATH or in CUDA_HOME: {error}")
            })?;
        println!("cargo::rustc-link-search=native={}", out.display());
        println!("cargo::rustc-link-lib=static=candle_fused_mlp_cuda");
        println!("cargo::rustc-link-lib=dylib=cudart");
        if !std::env::var("TARGET")?.contains("msvc") {
            println!("cargo::rustc-link-lib=stdc++");
        }
        Ok(())
    }
}
