//! Operation graphs and execution plans.
//!
//! ```text
//!   Graph ── tensors, operations ──► heuristics ──► engine configurations ──► Plan (first that finalises)
//!   Plan + addresses (variant pack) ──► execute on the handle's stream
//! ```
//! A plan is made for a live device, or, to be checked without a GPU, for a description of one.

use crate::driver::RawStream;
use cudarc::cudnn::sys as dnn;
use ramtorch_device::EngineError;
use std::ffi::{CStr, c_void};

use dnn::cudnnBackendAttributeName_t as Attribute;
use dnn::cudnnBackendAttributeType_t as Type;
use dnn::cudnnBackendDescriptorType_t as Kind;
pub(super) use dnn::cudnnDataType_t as Format;
pub(super) use dnn::cudnnPointwiseMode_t as Pointwise;
pub(super) use dnn::cudnnReduceTensorOp_t as Reduction;

fn check(status: dnn::cudnnStatus_t, what: &str) -> Result<(), EngineError> {
    if status == dnn::cudnnStatus_t::CUDNN_STATUS_SUCCESS {
        return Ok(());
    }
    let mut text = [0u8; 1024];
    // SAFETY: the buffer has the size that is passed; cuDNN terminates the text.
    unsafe { dnn::cudnnGetLastErrorString(text.as_mut_ptr().cast(), text.len()) };
    let text = CStr::from_bytes_until_nul(&text).map(|t| t.to_string_lossy().into_owned()).unwrap_or_default();
    Err(EngineError::internal(format!("cuDNN: {what}: {status:?} {text}")))
}

/// A library handle whose work goes to one stream.
pub(crate) struct Handle(dnn::cudnnHandle_t);

// SAFETY: used by one thread at a time (the device owns it), from any.
unsafe impl Send for Handle {}

impl Handle {
    pub(crate) fn new(stream: &RawStream) -> Result<Handle, EngineError> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes the handle.
        check(unsafe { dnn::cudnnCreate(&mut handle) }, "cudnnCreate")?;
        let handle = Handle(handle);
        // SAFETY: live handle and stream; the device drops the handle before the stream.
        check(unsafe { dnn::cudnnSetStream(handle.0, stream.0 as dnn::cudaStream_t) }, "cudnnSetStream")?;
        Ok(handle)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        unsafe { dnn::cudnnDestroy(self.0) };
    }
}

/// A descriptor of the backend.
pub(crate) struct Descriptor(dnn::cudnnBackendDescriptor_t);

// SAFETY: as for the handle.
unsafe impl Send for Descriptor {}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        unsafe { dnn::cudnnBackendDestroyDescriptor(self.0) };
    }
}

impl Descriptor {
    fn new(kind: Kind) -> Result<Descriptor, EngineError> {
        let mut p = std::ptr::null_mut();
        // SAFETY: writes the pointer.
        check(unsafe { dnn::cudnnBackendCreateDescriptor(kind, &mut p) }, &format!("create {kind:?}"))?;
        Ok(Descriptor(p))
    }
    fn set<T>(&self, attribute: Attribute, kind: Type, values: &[T]) -> Result<(), EngineError> {
        // SAFETY: a live descriptor; `values` are of the attribute's type.
        check(
            unsafe { dnn::cudnnBackendSetAttribute(self.0, attribute, kind, values.len() as i64, values.as_ptr().cast()) },
            &format!("set {attribute:?}"),
        )
    }
    fn refer(&self, attribute: Attribute, other: &Descriptor) -> Result<(), EngineError> {
        self.set(attribute, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &[other.0])
    }
    fn finish(&self, what: &str) -> Result<(), EngineError> {
        // SAFETY: a live descriptor.
        check(unsafe { dnn::cudnnBackendFinalize(self.0) }, &format!("finalize {what}"))
    }
    fn integer(&self, attribute: Attribute) -> Result<i64, EngineError> {
        let (mut value, mut count) = (0i64, 0i64);
        // SAFETY: room for one integer.
        let status = unsafe {
            dnn::cudnnBackendGetAttribute(self.0, attribute, Type::CUDNN_TYPE_INT64, 1, &mut count, std::ptr::from_mut(&mut value).cast())
        };
        check(status, &format!("get {attribute:?}"))?;
        Ok(value)
    }
}

/// What plans are made for.
pub(crate) enum Target<'a> {
    /// The device of the handle's context.
    Live(&'a Handle),
    /// A description of a device.
    #[cfg_attr(not(test), expect(dead_code, reason = "plans are checked without a GPU in tests"))]
    Described(Descriptor),
}

impl Target<'_> {
    /// From cuDNN's description of a device in JSON.
    #[cfg(test)]
    pub(crate) fn described(json: &str) -> Result<Target<'static>, EngineError> {
        let p = Descriptor::new(Kind::CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR)?;
        p.set(Attribute::CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, Type::CUDNN_TYPE_CHAR, json.as_bytes())?;
        p.finish("device properties")?;
        Ok(Target::Described(p))
    }
}

/// Sizes and strides, in elements.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub(super) dims: [i64; 4],
    pub(super) strides: [i64; 4],
}

/// Index of a tensor of a graph.
pub(super) type Tensor = usize;

/// A graph under construction.
pub(super) struct Graph {
    descriptors: Vec<Descriptor>,
    operations: Vec<dnn::cudnnBackendDescriptor_t>,
    next_virtual: i64,
}

impl Graph {
    pub(super) fn new() -> Graph {
        Graph { descriptors: Vec::new(), operations: Vec::new(), next_virtual: 100 }
    }

    fn keep(&mut self, d: Descriptor) -> usize {
        self.descriptors.push(d);
        self.descriptors.len() - 1
    }

    fn tensor(&mut self, id: i64, format: Format, l: Layout, intermediate: bool, by_value: bool) -> Result<Tensor, EngineError> {
        let t = Descriptor::new(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?;
        t.set(Attribute::CUDNN_ATTR_TENSOR_DATA_TYPE, Type::CUDNN_TYPE_DATA_TYPE, &[format])?;
        t.set(Attribute::CUDNN_ATTR_TENSOR_DIMENSIONS, Type::CUDNN_TYPE_INT64, &l.dims)?;
        t.set(Attribute::CUDNN_ATTR_TENSOR_STRIDES, Type::CUDNN_TYPE_INT64, &l.strides)?;
        t.set(Attribute::CUDNN_ATTR_TENSOR_UNIQUE_ID, Type::CUDNN_TYPE_INT64, &[id])?;
        t.set(Attribute::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, Type::CUDNN_TYPE_INT64, &[16i64])?;
        if by_value {
            t.set(Attribute::CUDNN_ATTR_TENSOR_IS_BY_VALUE, Type::CUDNN_TYPE_BOOLEAN, &[true])?;
        }
        if intermediate {
            t.set(Attribute::CUDNN_ATTR_TENSOR_IS_VIRTUAL, Type::CUDNN_TYPE_BOOLEAN, &[true])?;
        }
        t.finish("tensor")?;
        Ok(self.keep(t))
    }

    /// A tensor in memory.
    pub(super) fn real(&mut self, id: i64, format: Format, l: Layout) -> Result<Tensor, EngineError> {
        self.tensor(id, format, l, false, false)
    }
    /// An intermediate, which never exists in memory.
    pub(super) fn between(&mut self, format: Format, l: Layout) -> Result<Tensor, EngineError> {
        self.next_virtual += 1;
        self.tensor(self.next_virtual, format, l, true, false)
    }
    /// A float passed by address when the plan runs.
    pub(super) fn scalar(&mut self, id: i64) -> Result<Tensor, EngineError> {
        self.tensor(id, Format::CUDNN_DATA_FLOAT, Layout { dims: [1; 4], strides: [1; 4] }, false, true)
    }

    fn operation(&mut self, o: Descriptor, what: &str, inner: Option<Descriptor>) -> Result<(), EngineError> {
        o.finish(what)?;
        self.operations.push(o.0);
        self.keep(o);
        if let Some(d) = inner {
            self.keep(d);
        }
        Ok(())
    }

    /// y = mode(x, b, t).
    pub(super) fn pointwise(
        &mut self,
        mode: Pointwise,
        math: Format,
        x: Tensor,
        b: Option<Tensor>,
        t: Option<Tensor>,
        y: Tensor,
        axis: Option<i64>,
    ) -> Result<(), EngineError> {
        let p = Descriptor::new(Kind::CUDNN_BACKEND_POINTWISE_DESCRIPTOR)?;
        p.set(Attribute::CUDNN_ATTR_POINTWISE_MODE, Type::CUDNN_TYPE_POINTWISE_MODE, &[mode])?;
        p.set(Attribute::CUDNN_ATTR_POINTWISE_MATH_PREC, Type::CUDNN_TYPE_DATA_TYPE, &[math])?;
        if let Some(a) = axis {
            p.set(Attribute::CUDNN_ATTR_POINTWISE_AXIS, Type::CUDNN_TYPE_INT64, &[a])?;
        }
        p.finish("pointwise")?;
        let o = Descriptor::new(Kind::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR)?;
        o.refer(Attribute::CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, &p)?;
        o.refer(Attribute::CUDNN_ATTR_OPERATION_POINTWISE_XDESC, &self.descriptors[x])?;
        if let Some(b) = b {
            o.refer(Attribute::CUDNN_ATTR_OPERATION_POINTWISE_BDESC, &self.descriptors[b])?;
        }
        if let Some(t) = t {
            o.refer(Attribute::CUDNN_ATTR_OPERATION_POINTWISE_TDESC, &self.descriptors[t])?;
        }
        o.refer(Attribute::CUDNN_ATTR_OPERATION_POINTWISE_YDESC, &self.descriptors[y])?;
        self.operation(o, &format!("{mode:?}"), Some(p))
    }

    /// y = mode(x, b) in single precision.
    pub(super) fn apply(&mut self, mode: Pointwise, x: Tensor, b: Option<Tensor>, y: Tensor) -> Result<(), EngineError> {
        self.pointwise(mode, Format::CUDNN_DATA_FLOAT, x, b, None, y, None)
    }

    /// c = a · b, accumulated in single precision.
    pub(super) fn matmul(&mut self, a: Tensor, b: Tensor, c: Tensor) -> Result<(), EngineError> {
        let m = Descriptor::new(Kind::CUDNN_BACKEND_MATMUL_DESCRIPTOR)?;
        m.set(Attribute::CUDNN_ATTR_MATMUL_COMP_TYPE, Type::CUDNN_TYPE_DATA_TYPE, &[Format::CUDNN_DATA_FLOAT])?;
        m.finish("matmul")?;
        let o = Descriptor::new(Kind::CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR)?;
        o.refer(Attribute::CUDNN_ATTR_OPERATION_MATMUL_ADESC, &self.descriptors[a])?;
        o.refer(Attribute::CUDNN_ATTR_OPERATION_MATMUL_BDESC, &self.descriptors[b])?;
        o.refer(Attribute::CUDNN_ATTR_OPERATION_MATMUL_CDESC, &self.descriptors[c])?;
        o.refer(Attribute::CUDNN_ATTR_OPERATION_MATMUL_DESC, &m)?;
        self.operation(o, "matmul", Some(m))
    }

    /// y = x reduced along the dimensions that y lacks.
    pub(super) fn reduce(&mut self, r: Reduction, x: Tensor, y: Tensor) -> Result<(), EngineError> {
        let m = Descriptor::new(Kind::CUDNN_BACKEND_REDUCTION_DESCRIPTOR)?;
        m.set(Attribute::CUDNN_ATTR_REDUCTION_COMP_TYPE, Type::CUDNN_TYPE_DATA_TYPE, &[Format::CUDNN_DATA_FLOAT])?;
        m.set(Attribute::CUDNN_ATTR_REDUCTION_OPERATOR, Type::CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, &[r])?;
        m.finish("reduction")?;
        let o = Descriptor::new(Kind::CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR)?;
        o.refer(Attribute::CUDNN_ATTR_OPERATION_REDUCTION_XDESC, &self.descriptors[x])?;
        o.refer(Attribute::CUDNN_ATTR_OPERATION_REDUCTION_YDESC, &self.descriptors[y])?;
        o.refer(Attribute::CUDNN_ATTR_OPERATION_REDUCTION_DESC, &m)?;
        self.operation(o, "reduction", Some(m))
    }

    /// y = x in another layout.
    pub(super) fn reshape(&mut self, x: Tensor, y: Tensor) -> Result<(), EngineError> {
        let o = Descriptor::new(Kind::CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR)?;
        o.refer(Attribute::CUDNN_ATTR_OPERATION_RESHAPE_XDESC, &self.descriptors[x])?;
        o.refer(Attribute::CUDNN_ATTR_OPERATION_RESHAPE_YDESC, &self.descriptors[y])?;
        self.operation(o, "reshape", None)
    }

    /// The first plan that the heuristics propose and that can be made.
    pub(super) fn plan(self, target: &Target, name: &str) -> Result<Plan, EngineError> {
        const CONFIGURATIONS: usize = 8;
        let graph = Descriptor::new(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?;
        graph.set(Attribute::CUDNN_ATTR_OPERATIONGRAPH_OPS, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &self.operations)?;
        if let Target::Live(h) = target {
            graph.set(Attribute::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, Type::CUDNN_TYPE_HANDLE, &[h.0])?;
        }
        graph.finish(name)?;
        let heuristics = Descriptor::new(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?;
        heuristics.refer(Attribute::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, &graph)?;
        heuristics.set(
            Attribute::CUDNN_ATTR_ENGINEHEUR_MODE,
            Type::CUDNN_TYPE_HEUR_MODE,
            &[dnn::cudnnBackendHeurMode_t::CUDNN_HEUR_MODE_A],
        )?;
        if let Target::Described(d) = target {
            heuristics.refer(Attribute::CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, d)?;
        }
        heuristics.finish("heuristics")?;
        let configurations: Vec<Descriptor> =
            (0..CONFIGURATIONS).map(|_| Descriptor::new(Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR)).collect::<Result<_, _>>()?;
        let mut raw: Vec<_> = configurations.iter().map(|c| c.0).collect();
        let mut found = 0i64;
        // SAFETY: room for CONFIGURATIONS descriptors, which exist and are filled in.
        let status = unsafe {
            dnn::cudnnBackendGetAttribute(
                heuristics.0,
                Attribute::CUDNN_ATTR_ENGINEHEUR_RESULTS,
                Type::CUDNN_TYPE_BACKEND_DESCRIPTOR,
                CONFIGURATIONS as i64,
                &mut found,
                raw.as_mut_ptr().cast(),
            )
        };
        check(status, "heuristics")?;
        let mut reason = EngineError::internal(format!("cuDNN has no engine for {name}"));
        for c in configurations.iter().take(found.max(0) as usize) {
            let plan = Descriptor::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?;
            match target {
                Target::Live(h) => plan.set(Attribute::CUDNN_ATTR_EXECUTION_PLAN_HANDLE, Type::CUDNN_TYPE_HANDLE, &[h.0])?,
                Target::Described(d) => plan.refer(Attribute::CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, d)?,
            }
            plan.refer(Attribute::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, c)?;
            match plan.finish(name) {
                Ok(()) => {
                    let workspace = plan.integer(Attribute::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE)?;
                    return Ok(Plan {
                        plan,
                        workspace: workspace.max(0) as u64,
                        _graph: graph,
                        _parts: self.descriptors,
                        _configurations: configurations,
                    });
                }
                Err(e) => reason = e,
            }
        }
        Err(reason)
    }
}

/// A graph compiled for a device.
pub(crate) struct Plan {
    plan: Descriptor,
    /// Bytes of workspace that [`Plan::run`] needs.
    pub(crate) workspace: u64,
    _graph: Descriptor,
    _parts: Vec<Descriptor>,
    _configurations: Vec<Descriptor>,
}

impl Plan {
    /// Enqueues the plan on the handle's stream. `tensors` gives each tensor in memory its device address and each
    /// scalar the address of its value on the host.
    pub(crate) fn run(&self, handle: &Handle, tensors: &[(i64, u64)], workspace: u64) -> Result<(), EngineError> {
        let ids: Vec<i64> = tensors.iter().map(|t| t.0).collect();
        let pointers: Vec<*mut c_void> = tensors.iter().map(|t| t.1 as *mut c_void).collect();
        let pack = Descriptor::new(Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?;
        pack.set(Attribute::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, Type::CUDNN_TYPE_INT64, &ids)?;
        pack.set(Attribute::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, Type::CUDNN_TYPE_VOID_PTR, &pointers)?;
        pack.set(Attribute::CUDNN_ATTR_VARIANT_PACK_WORKSPACE, Type::CUDNN_TYPE_VOID_PTR, &[workspace as *mut c_void])?;
        pack.finish("addresses")?;
        // SAFETY: live handle, plan and pack; the addresses are of tensors as the plan describes them.
        check(unsafe { dnn::cudnnBackendExecute(handle.0, self.plan.0, pack.0) }, "execute")
    }
}
