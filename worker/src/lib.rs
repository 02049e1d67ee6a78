//! The engine: devices, models, schedule, plan, optimizer.
//!
//! `ramtorchd` links this crate twice over: the daemon calls [`plan`] and [`create_segment`], which are pure or
//! touch shared memory only, and the worker processes it spawns call [`run`].

pub mod api;

pub use api::*;

/// Works out where everything goes and what a step costs. Pure: opens no file and allocates nothing.
pub fn plan(_request: &PlanRequest) -> Result<Plan, EngineError> {
    Err(EngineError::internal("not built in this binary"))
}

/// Reserves the parameter store of a planned job under `name` (POSIX shared memory), empty.
pub fn create_segment(_name: &str, _plan: &Plan) -> Result<(), EngineError> {
    Err(EngineError::internal("not built in this binary"))
}

/// Does what `assignment` says, in this process, until it is done or told to stop. The value is role-specific:
/// [`Prepared`] for `Prepare`, [`TrainOutcome`] for `Train`, and so on.
pub fn run(_assignment: &Assignment, _control: &dyn Control) -> Result<serde_json::Value, EngineError> {
    Err(EngineError::internal("not built in this binary"))
}
