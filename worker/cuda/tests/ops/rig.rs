//! A GPU and the reference beside it.

use half::bf16;
use ramtorch_cpu::CpuDevice;
use ramtorch_cuda::CudaDevice;
use ramtorch_device::{DevBuf, Device, Dtype, EngineError, Stream};
use std::cell::Cell;

/// Bytes before and after each buffer that nobody may write.
const FENCE: u64 = 256;
const POISON: u8 = 0xff;

/// Both devices, and a source of random numbers.
pub struct Rig {
    pub gpu: CudaDevice,
    pub cpu: CpuDevice,
    pub dtype: Dtype,
    seed: Cell<u64>,
}

/// What a buffer's elements are.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Format {
    /// The device's compute format.
    Real,
    F32,
    I32,
}

/// The same tensor on both devices.
#[derive(Clone, Copy)]
pub struct Tensor {
    pub gpu: DevBuf,
    pub cpu: DevBuf,
    pub len: usize,
    pub format: Format,
    pub fenced: DevBuf,
}

impl Rig {
    pub fn new(dtype: Dtype, deterministic: bool) -> Rig {
        let threads = std::thread::available_parallelism().map_or(2, |n| n.get());
        Rig {
            gpu: CudaDevice::open(0, dtype, 4 << 30, deterministic).unwrap(),
            cpu: CpuDevice::open(0, Dtype::F32, threads, 8 << 30).unwrap(),
            dtype,
            seed: Cell::new(0x9E37_79B9),
        }
    }

    pub fn next(&self) -> u64 {
        let s = self.seed.get().wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.seed.set(s);
        s >> 33
    }

    /// About normal, unit variance.
    pub fn normal(&self) -> f32 {
        let u = || self.next() as f32 / (1u64 << 31) as f32;
        (u() + u() + u() + u() - 2.0) * 1.732
    }

    pub fn numbers(&self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.normal() * scale).collect()
    }

    fn size(&self, format: Format) -> u64 {
        if format == Format::Real { self.dtype.size() } else { 4 }
    }

    /// Room on both devices; on the GPU poisoned, with a fence around, `shift` elements behind an aligned address.
    pub fn room(&mut self, len: usize, format: Format, shift: usize) -> Tensor {
        let size = self.size(format);
        let bytes = len as u64 * size;
        let fenced = self.gpu.alloc(bytes + 3 * FENCE, "test").unwrap();
        let poison = vec![POISON; fenced.bytes as usize];
        self.gpu.upload(Stream::Compute, fenced, &poison).unwrap();
        let gpu = fenced.slice(FENCE + shift as u64 * size, bytes);
        let cpu = self.cpu.alloc(len as u64 * 4, "test").unwrap();
        Tensor { gpu, cpu, len, format, fenced }
    }

    pub fn output(&mut self, len: usize) -> Tensor {
        self.room(len, Format::Real, 0)
    }
    pub fn output_f32(&mut self, len: usize) -> Tensor {
        self.room(len, Format::F32, 0)
    }

    /// Gives both devices the same values: rounded to the compute format first.
    pub fn fill(&self, t: &Tensor, values: &[f32]) {
        assert_eq!(values.len(), t.len);
        let rounded: Vec<f32> = values
            .iter()
            .map(|v| if t.format == Format::Real && self.dtype == Dtype::Bf16 { bf16::from_f32(*v).to_f32() } else { *v })
            .collect();
        let exact: Vec<u8> = rounded.iter().flat_map(|v| v.to_le_bytes()).collect();
        let bytes = match (t.format, self.dtype) {
            (Format::Real, Dtype::Bf16) => rounded.iter().flat_map(|v| bf16::from_f32(*v).to_bits().to_le_bytes()).collect(),
            _ => exact.clone(),
        };
        self.gpu.upload(Stream::Compute, t.gpu, &bytes).unwrap();
        self.cpu.upload(Stream::Compute, t.cpu, &exact).unwrap();
    }

    pub fn shifted_input(&mut self, len: usize, scale: f32, shift: usize) -> Tensor {
        let t = self.room(len, Format::Real, shift);
        let values = self.numbers(len, scale);
        self.fill(&t, &values);
        t
    }
    pub fn input(&mut self, len: usize, scale: f32) -> Tensor {
        self.shifted_input(len, scale, 0)
    }
    pub fn input_f32(&mut self, len: usize, scale: f32) -> Tensor {
        let values = self.numbers(len, scale);
        self.given(&values)
    }
    pub fn given(&mut self, values: &[f32]) -> Tensor {
        let t = self.room(values.len(), Format::F32, 0);
        self.fill(&t, values);
        t
    }
    pub fn integers(&mut self, values: &[i32]) -> Tensor {
        let t = self.room(values.len(), Format::I32, 0);
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.gpu.upload(Stream::Compute, t.gpu, &bytes).unwrap();
        self.cpu.upload(Stream::Compute, t.cpu, &bytes).unwrap();
        t
    }

    /// Runs the same operation on both devices.
    pub fn both(&self, f: impl Fn(&dyn Device, &dyn Fn(&Tensor) -> DevBuf) -> Result<(), EngineError>) {
        f(&self.gpu, &|t| t.gpu).unwrap_or_else(|e| panic!("{e}"));
        f(&self.cpu, &|t| t.cpu).unwrap_or_else(|e| panic!("cpu: {e}"));
    }

    pub fn gpu_values(&self, t: &Tensor) -> Vec<f32> {
        let mut bytes = vec![0u8; t.gpu.bytes as usize];
        self.gpu.download(Stream::Compute, t.gpu, &mut bytes).unwrap();
        match (t.format, self.dtype) {
            (Format::Real, Dtype::Bf16) => {
                bytes.chunks_exact(2).map(|b| bf16::from_bits(u16::from_le_bytes([b[0], b[1]])).to_f32()).collect()
            }
            _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        }
    }

    pub fn gpu_bytes(&self, t: &Tensor) -> Vec<u8> {
        let mut bytes = vec![0u8; t.gpu.bytes as usize];
        self.gpu.download(Stream::Compute, t.gpu, &mut bytes).unwrap();
        bytes
    }

    pub fn cpu_values(&self, t: &Tensor) -> Vec<f32> {
        let mut bytes = vec![0u8; t.len * 4];
        self.cpu.download(Stream::Compute, t.cpu, &mut bytes).unwrap();
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    /// Nothing was written around the tensor.
    pub fn fence(&self, what: &str, t: &Tensor) {
        let mut bytes = vec![0u8; t.fenced.bytes as usize];
        self.gpu.download(Stream::Compute, t.fenced, &mut bytes).unwrap();
        let (start, end) = ((t.gpu.ptr - t.fenced.ptr) as usize, (t.gpu.ptr - t.fenced.ptr + t.gpu.bytes) as usize);
        let hit = bytes.iter().enumerate().find(|(i, b)| !(start..end).contains(i) && **b != POISON);
        assert!(hit.is_none(), "{what}: byte {} around a tensor at {start}..{end} was written", hit.map_or(0, |h| h.0));
    }

    /// ‖gpu - cpu‖ / ‖cpu‖ of a tensor is at most `limit` on a bf16 device and `limit_f32` on a single precision one; NaN never passes.
    pub fn agree(&self, what: &str, t: &Tensor, limit_bf16: f64, limit_f32: f64) {
        self.fence(what, t);
        compare(what, &self.gpu_values(t), &self.cpu_values(t), if self.dtype == Dtype::Bf16 { limit_bf16 } else { limit_f32 });
    }

    /// Results rounded to the compute format once.
    pub fn close(&self, what: &str, t: &Tensor) {
        // bf16 rounds by up to 2^-8 of a value, a third of that in the mean over many; a library may round twice.
        let rounded = if t.len < 64 { 8e-3 } else { 3e-3 };
        self.agree(what, t, if t.format == Format::Real { rounded } else { 2e-5 }, 5e-6);
    }
}

pub fn compare(what: &str, got: &[f32], want: &[f32], limit: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let (mut error, mut norm, mut worst) = (0f64, 0f64, (0f64, 0usize));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        if !g.is_finite() && w.is_finite() {
            panic!("{what}: element {i} of {} is {g}, expected {w}", got.len());
        }
        if !w.is_finite() {
            assert!(g == w || (g.is_nan() && w.is_nan()), "{what}: element {i} is {g}, expected {w}");
            continue;
        }
        let e = (*g as f64 - *w as f64).abs();
        if e > worst.0 {
            worst = (e, i);
        }
        error += e * e;
        norm += *w as f64 * *w as f64;
    }
    let relative = (error / norm.max(1e-30)).sqrt();
    println!(
        "    {what}: relative error {relative:.1e}, largest {:.1e} of root mean square {:.1e}",
        worst.0,
        (norm / got.len().max(1) as f64).sqrt()
    );
    assert!(
        relative <= limit,
        "{what}: relative error {relative:.2e} > {limit:.1e}; worst at {} of {}: {} for {}",
        worst.1,
        got.len(),
        got[worst.1],
        want[worst.1]
    );
}

/// A tool looks at every access, which makes tests a thousand times slower (`run_tests.sh` says so).
pub fn watched() -> bool {
    std::env::var_os("RAMTORCH_OPS_WATCHED").is_some()
}

/// Runs a test on devices of both formats.
pub fn formats(f: impl Fn(Rig)) {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        println!("  {dtype:?}");
        f(Rig::new(dtype, false));
    }
}
