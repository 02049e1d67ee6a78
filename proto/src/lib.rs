//! The gRPC protocol of ramtorch: messages, clients and servers generated from `proto/ramtorch/v1/*.proto`.
#![forbid(unsafe_code)]
#![allow(missing_docs, clippy::all)]

/// Version 1 of the protocol.
pub mod v1 {
    tonic::include_proto!("ramtorch.v1");
}

/// The encoded `FileDescriptorSet` of every service, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ramtorch_descriptor.bin"));
