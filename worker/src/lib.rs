//! The engine: models, schedule, plan, optimizer.
//!
//! `ramtorchd` links this crate twice over: the daemon calls [`plan`] and [`create_segment`], which are pure or
//! touch shared memory only, and the worker processes it spawns call [`run`].
#![forbid(unsafe_code)]

pub mod api;
mod batch;
mod checkpoint;
mod device;
mod early;
mod errors;
mod evaluate;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod generate;
mod inference;
mod metrics;
mod model;
mod numa;
mod optimizer;
mod places;
mod plan;
mod prepare;
mod rates;
mod record;
mod sampling;
mod session;
mod tools;
mod trace;
mod train;
mod weights;

pub use api::*;
pub use checkpoint::FIRST_CHECKPOINT;
pub use plan::plan;

use ramtorch_store::Store;

/// Reserves the parameter store of a planned job under `name` (POSIX shared memory), empty.
///
/// # Errors
/// Too little memory (with the bytes wanted and free), or the name is taken.
pub fn create_segment(name: &str, plan: &Plan) -> Result<(), EngineError> {
    let engine = plan::EnginePlan::of(plan)?;
    let nodes = numa::nodes_of(&engine.bus_ids).unwrap_or_default();
    Store::create_near(name, &engine.store, &nodes).map_err(errors::store).map(drop)
}

/// To be called first thing in a worker process, before it has threads: where there is an NVIDIA driver, makes the
/// CUDA libraries findable (which may start the program again, once, with a longer `LD_LIBRARY_PATH`).
///
/// # Errors
/// The program cannot be started again.
pub fn prepare_process() -> Result<(), EngineError> {
    let driver = ["/dev/nvidiactl", "/dev/dxg"].iter().any(|p| std::path::Path::new(p).exists());
    if driver { ramtorch_cuda::ensure_libraries() } else { Ok(()) }
}

/// The usable GPUs of this machine. Loads CUDA: not for the daemon's own process.
///
/// # Errors
/// A library is missing or too old (with where it was looked for), or there is no usable GPU.
pub fn gpus() -> Result<Vec<GpuSeen>, EngineError> {
    let seen = |g: ramtorch_cuda::GpuInfo| GpuSeen { index: g.ordinal, memory_bytes: g.memory_bytes, bus_id: g.bus_id };
    Ok(ramtorch_cuda::available()?.into_iter().map(seen).collect())
}

/// Does what `assignment` says, in this process, until it is done or told to stop. The value is role-specific:
/// [`Prepared`] for `Prepare`, [`TrainOutcome`] for `Train`, and so on.
///
/// # Errors
/// With the class that becomes the exit code.
pub fn run(assignment: &Assignment, control: &dyn Control) -> Result<serde_json::Value, EngineError> {
    fn value<T: serde::Serialize>(x: T) -> Result<serde_json::Value, EngineError> {
        serde_json::to_value(x).map_err(EngineError::internal)
    }
    match &assignment.task {
        Task::Prepare { spec, cache_dir, gpus, gpus_free, noted } => {
            let gpus = rates::Gpus { all: gpus, free: *gpus_free };
            let prepared = prepare::run(assignment, spec, cache_dir, gpus, noted.as_deref(), control)?;
            ramtorch_failpoint::hit(ramtorch_failpoint::Point::Prepared);
            value(prepared)
        }
        Task::Train { spec, prepared, plan, segment, history } => {
            value(train::run(assignment, spec, prepared, plan, segment, history, control)?)
        }
        Task::Generate { source, request } => value(generate::run(assignment, source, request, control)?),
        Task::Eval { source, request } => value(evaluate::run(assignment, source, request, control)?),
        Task::Export { source, path, dtype, overwrite } => value(tools::export(source, path, *dtype, *overwrite, control)?),
        Task::Inspect { source, names, values } => value(tools::describe(source, names, *values, control)?),
    }
}
