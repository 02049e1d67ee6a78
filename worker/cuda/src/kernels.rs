//! The kernels of a device: compiled, loaded, launched.

use crate::driver::{Function, Module, RawStream, cu};
use crate::nvrtc::{self, Source};
use ramtorch_device::{Dtype, EngineError};
use std::collections::HashMap;
use std::ffi::c_void;

macro_rules! source {
    ($name:literal) => {
        Source { name: $name, text: include_str!(concat!("../../kernels/", $name)) }
    };
}

/// A file and the kernels that are taken from it.
struct File {
    source: Source,
    kernels: &'static [&'static str],
}

const FILES: [File; 9] = [
    File {
        source: source!("norm.cu"),
        kernels: &[
            "rms_forward_v",
            "rms_forward_s",
            "layer_forward_v",
            "layer_forward_s",
            "rms_backward_v",
            "rms_backward_s",
            "layer_backward_v",
            "layer_backward_s",
        ],
    },
    File {
        source: source!("reduce.cu"),
        kernels: &[
            "column_partial_v",
            "column_partial_s",
            "reduce_partials",
            "squares_bf16_v",
            "squares_bf16_s",
            "squares_f32_v",
            "squares_f32_s",
            "sum_f64",
        ],
    },
    File { source: source!("rope.cu"), kernels: &["rope_v", "rope_s"] },
    File {
        source: source!("pointwise.cu"),
        kernels: &[
            "glu_forward_v",
            "glu_forward_s",
            "glu_backward_v",
            "glu_backward_s",
            "activation_forward_v",
            "activation_forward_s",
            "activation_backward_v",
            "activation_backward_s",
            "add_to_v",
            "add_to_s",
            "to_f32_v",
            "to_f32_s",
            "from_f32_v",
            "from_f32_s",
            "finish_gemm_real",
            "finish_gemm_f32",
        ],
    },
    File {
        source: source!("store.cu"),
        kernels: &[
            "upload",
            "join_master",
            "stage_gradient_bf16_v",
            "stage_gradient_bf16_s",
            "stage_gradient_f32_v",
            "stage_gradient_f32_s",
        ],
    },
    File {
        source: source!("embedding.cu"),
        kernels: &[
            "embedding_forward_v",
            "embedding_forward_s",
            "embedding_backward_v",
            "embedding_backward_s",
            "position_backward_v",
            "position_backward_s",
            "gather_rows_v",
            "gather_rows_s",
        ],
    },
    File { source: source!("loss.cu"), kernels: &["cross_entropy", "squared_error"] },
    File { source: source!("mask.cu"), kernels: &["first_keys"] },
    File { source: source!("gemm.cu"), kernels: &["gemm_real", "gemm_f32"] },
];

/// Compiled for one size of heads, when it is first met.
const ATTENTION: File = File {
    source: source!("attention.cu"),
    kernels: &[
        "attention_forward",
        "attention_delta",
        "attention_backward_keys",
        "attention_backward_queries",
        "cache_append",
        "attention_decode",
        "attention_part_1",
        "attention_part_4",
        "attention_join",
    ],
};

/// Compiled for the updater of pages. Its formats are the store's, not the device's.
const OPTIMIZER: File =
    File { source: source!("optimizer.cu"), kernels: &["adamw_f32_f32", "adamw_f32_bf16", "adamw_bf16_f32", "adamw_bf16_bf16"] };

fn defines(dtype: Dtype) -> Vec<String> {
    match dtype {
        Dtype::F32 => Vec::new(),
        Dtype::Bf16 => vec!["REAL_BF16".to_owned()],
    }
}

/// Chunks of 32 elements for which the attention kernels are compiled, to hold heads of `head_dim`.
pub(crate) fn attention_chunks(head_dim: usize) -> Result<u32, EngineError> {
    [1, 2, 3, 4, 8]
        .into_iter()
        .find(|c| head_dim <= 32 * *c as usize)
        .ok_or_else(|| EngineError::internal(format!("attention heads of {head_dim} elements: at most 256 on CUDA devices")))
}

/// Compiles every kernel for a device, whether it is there or not. What tests and `open` share.
pub(crate) fn compile_all(capability: (i32, i32), dtype: Dtype) -> Result<Vec<Vec<u8>>, EngineError> {
    std::thread::scope(|scope| {
        let jobs: Vec<_> = FILES.iter().map(|f| scope.spawn(move || nvrtc::cubin(&f.source, capability, &defines(dtype)))).collect();
        jobs.into_iter().map(|j| j.join().unwrap_or_else(|_| Err(EngineError::internal("the run-time compiler panicked")))).collect()
    })
}

pub(crate) fn compile_attention(capability: (i32, i32), dtype: Dtype, chunks: u32) -> Result<Vec<u8>, EngineError> {
    let mut defines = defines(dtype);
    defines.push(format!("CHUNKS={chunks}"));
    nvrtc::cubin(&ATTENTION.source, capability, &defines)
}

pub(crate) fn compile_optimizer(capability: (i32, i32)) -> Result<Vec<u8>, EngineError> {
    nvrtc::cubin(&OPTIMIZER.source, capability, &[])
}

/// Kernels by name. Modules stay loaded as long as this lives.
pub(crate) struct Kernels {
    functions: HashMap<&'static str, Function>,
    /// Of kernels with a variant for 16-byte accesses and one for single elements, in this order, by what their names share.
    pairs: HashMap<&'static str, [Function; 2]>,
    _modules: Vec<Module>,
}

impl Kernels {
    fn of<'a>(files: impl Iterator<Item = (&'a File, Vec<u8>)>) -> Result<Kernels, EngineError> {
        let (mut functions, mut modules) = (HashMap::new(), Vec::new());
        for (file, code) in files {
            let module = Module::load(&code, file.source.name)?;
            for name in file.kernels {
                functions.insert(*name, module.function(name)?);
            }
            modules.push(module);
        }
        let pair = |(name, wide): (&&'static str, &Function)| {
            let stem = name.strip_suffix("_v")?;
            let single = functions.get(format!("{stem}_s").as_str())?;
            Some((stem, [*wide, *single]))
        };
        let pairs = functions.iter().filter_map(pair).collect();
        Ok(Kernels { functions, pairs, _modules: modules })
    }

    pub(crate) fn load(capability: (i32, i32), dtype: Dtype) -> Result<Kernels, EngineError> {
        Self::of(FILES.iter().zip(compile_all(capability, dtype)?))
    }

    pub(crate) fn load_attention(capability: (i32, i32), dtype: Dtype, chunks: u32) -> Result<Kernels, EngineError> {
        Self::of(std::iter::once((&ATTENTION, compile_attention(capability, dtype, chunks)?)))
    }

    pub(crate) fn load_optimizer(capability: (i32, i32)) -> Result<Kernels, EngineError> {
        Self::of(std::iter::once((&OPTIMIZER, compile_optimizer(capability)?)))
    }

    /// The variant of a kernel for 16-byte accesses, or the one for single elements.
    pub(crate) fn variant(&self, stem: &str, wide: bool) -> Result<Function, EngineError> {
        let pair = self.pairs.get(stem).ok_or_else(|| EngineError::internal(format!("no kernels {stem}_v and {stem}_s")))?;
        Ok(pair[usize::from(!wide)])
    }

    pub(crate) fn get(&self, name: &str) -> Result<Function, EngineError> {
        self.functions.get(name).copied().ok_or_else(|| EngineError::internal(format!("no kernel {name}")))
    }
}

/// Blocks, threads and dynamic shared memory of a launch.
#[derive(Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) grid: (u32, u32, u32),
    pub(crate) block: (u32, u32),
    pub(crate) shared: u32,
}

impl Launch {
    pub(crate) fn new(grid: (u32, u32, u32), block: (u32, u32)) -> Launch {
        Launch { grid, block, shared: 0 }
    }
}

/// Enqueues a kernel. `arguments` point to values of the kernel's parameter types, in order.
pub(crate) fn enqueue(f: Function, l: Launch, stream: &RawStream, what: &str, arguments: &mut [*mut c_void]) -> Result<(), EngineError> {
    let (g, b) = (l.grid, l.block);
    cu!(what, cuLaunchKernel(f.0, g.0, g.1, g.2, b.0, b.1, 1, l.shared, stream.0, arguments.as_mut_ptr(), std::ptr::null_mut()))
}

/// `launch!(function, launch, stream, "op"; a, b, c)`: each argument is a variable of exactly the parameter's type.
macro_rules! launch {
    ($f:expr, $l:expr, $s:expr, $what:expr; $($a:expr),* $(,)?) => {
        $crate::kernels::enqueue($f, $l, $s, $what, &mut [$(std::ptr::from_ref(&$a).cast_mut().cast::<std::ffi::c_void>()),*])
    };
}
pub(crate) use launch;

#[cfg(test)]
mod tests {
    use super::*;

    /// Names in the tables exist in the sources.
    #[test]
    fn kernels_are_in_their_files() {
        for file in FILES.iter().chain([&ATTENTION, &OPTIMIZER]) {
            for kernel in file.kernels {
                let stem = kernel.trim_end_matches("_v").trim_end_matches("_s");
                assert!(file.source.text.contains(stem), "{kernel} is not in {}", file.source.name);
            }
        }
    }

    /// Every architecture that releases are made for. Needs libnvrtc on the library path, but no GPU.
    #[test]
    fn sources_compile_for_every_architecture() {
        if !nvrtc::to_test_with() {
            return;
        }
        for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)] {
            compile_optimizer(capability).unwrap_or_else(|e| panic!("{capability:?}: {e}"));
            for dtype in [Dtype::Bf16, Dtype::F32] {
                let code = compile_all(capability, dtype).unwrap_or_else(|e| panic!("{capability:?} {dtype:?}: {e}"));
                assert!(code.iter().all(|c| c.starts_with(b"\x7fELF")));
                compile_attention(capability, dtype, 4).unwrap_or_else(|e| panic!("{capability:?} {dtype:?}: {e}"));
            }
        }
        for chunks in [1, 2, 3, 8] {
            compile_attention((9, 0), Dtype::Bf16, chunks).unwrap_or_else(|e| panic!("{chunks} chunks: {e}"));
        }
    }

    #[test]
    fn heads_round_up_to_compiled_sizes() {
        assert_eq!(attention_chunks(33).unwrap(), 2);
        assert_eq!(attention_chunks(128).unwrap(), 4);
        assert_eq!(attention_chunks(160).unwrap(), 8);
        assert!(attention_chunks(257).is_err());
    }
}
