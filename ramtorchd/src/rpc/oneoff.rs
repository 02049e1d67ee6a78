//! One-off work, from the caller's side: start it, wait for its result.

use super::Context;
use crate::access::Caller;
use crate::supervisor::oneoff::OneOffEvent;
use crate::supervisor::{Message, Refusal};
use crate::world::guard;
use ramtorch_job::JobSpec;
use ramtorch_worker::{DeviceKind, EngineError, Plan, PlanRequest, Prepared, Task};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

/// Starts work. Dropping the receiver ends it.
pub async fn start(context: &Context, caller: &Caller, task: Task, gpu: bool) -> Result<mpsc::UnboundedReceiver<OneOffEvent>, Refusal> {
    let caller = caller.clone();
    context.handle.ask(|reply| Message::OneOff { task: Box::new(task), gpu, caller, reply }).await
}

/// Does work and waits for its result.
pub async fn result<T: DeserializeOwned>(context: &Context, caller: &Caller, task: Task, gpu: bool) -> Result<T, Refusal> {
    let mut events = start(context, caller, task, gpu).await?;
    while let Some(event) = events.recv().await {
        if let OneOffEvent::Done(result) = event {
            return decode(result);
        }
    }
    Err(EngineError::internal("the daemon stopped before the work was done").into())
}

/// The result in the caller's terms.
pub fn decode<T: DeserializeOwned>(result: Result<String, EngineError>) -> Result<T, Refusal> {
    let json = result?;
    serde_json::from_str(&json).map_err(|e| EngineError::internal(format!("the worker's result makes no sense: {e}")).into())
}

/// Prepares and plans a job without submitting it.
pub async fn plan(context: &Context, caller: &Caller, spec: JobSpec) -> Result<(Prepared, Plan), Refusal> {
    let (ranks, memory_bytes) = (spec.device.ranks, spec.device.memory_bytes);
    let place = context.handle.ask(|reply| Message::PlanContext { ranks, memory_bytes, reply }).await?;
    let gpus = place.devices.iter().filter(|d| d.kind == DeviceKind::Cuda).map(|d| d.index).collect();
    let task = Task::Prepare { spec: spec.clone(), cache_dir: context.cache.clone(), gpus, gpus_free: false, noted: None };
    let prepared: Prepared = result(context, caller, task, false).await?;
    let request = PlanRequest {
        spec,
        prepared: prepared.clone(),
        devices: place.devices,
        segment_bytes_available: place.segment_bytes,
        ram_bytes_available: place.ram_bytes,
    };
    let engine = context.engine.clone();
    let plan = tokio::task::spawn_blocking(move || guard(|| engine.plan(&request)));
    let plan = plan.await.map_err(|e| EngineError::internal(format!("planning was broken off: {e}")))??;
    Ok((prepared, plan))
}
