//! Client of `ramtorchd`: typed calls over its unix socket, and a view of a running job for people and programs.
//!
//! ```no_run
//! # async fn example() -> Result<(), ramtorch_client::ClientError> {
//! use ramtorch_client::{Client, Endpoint, ui};
//!
//! let mut client = Client::connect(Endpoint::default()).await?;
//! for job in client.list(false).await? {
//!     println!("{} {}", job.id, job.name);
//! }
//! let end = ui::follow(&mut client, "my-job", ui::FollowOptions::default()).await?;
//! println!("ended with {}", end.exit_code);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod client;
pub mod doctor;
mod endpoint;
mod error;
pub mod exit;
pub mod json;
mod tls;
pub mod trace;
pub mod ui;

pub use client::{Client, Deadlines, Events, MAX_ANSWER_BYTES, MAX_REQUEST_BYTES};
pub use endpoint::{ADDRESS_VARIABLE, Endpoint, SOCKET_VARIABLE, TcpEndpoint};
pub use error::{ClientError, EXIT_CODE_METADATA};
pub use ramtorch_proto::v1;
