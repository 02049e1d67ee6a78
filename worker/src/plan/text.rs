//! The plan in words.

use super::{Cost, EnginePlan};
use crate::api::{DeviceKind, DeviceSpec, Prepared};
use crate::model::Model;
use ramtorch_store::{GradientFormat, Layout, MomentFormat};
use std::fmt::Write;

fn size(bytes: u64) -> String {
    match bytes {
        0..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.2} GiB", bytes as f64 / 1_073_741_824.0),
    }
}

fn count(flags: &[bool]) -> usize {
    flags.iter().filter(|f| **f).count()
}

pub(crate) fn describe(
    model: &Model,
    layout: &Layout,
    p: &EnginePlan,
    devices: &[DeviceSpec],
    prepared: &Prepared,
    seconds: f64,
    cost: &Cost,
) -> String {
    let mut t = String::new();
    let moments = match p.store.moments {
        MomentFormat::None => "no moments",
        MomentFormat::F32 => "fp32 moments",
        MomentFormat::Bf16 => "bf16 moments",
    };
    let gradients = match p.store.gradients {
        GradientFormat::None => "no gradients",
        GradientFormat::F32 => "fp32 gradients",
        GradientFormat::Bf16 => "bf16 gradients",
    };
    let names: Vec<String> = devices.iter().map(|d| d.to_string()).collect();
    let u = &p.uses;
    let last = model.len() - 1;
    let per = layout.bytes() as f64 / layout.parameters().max(1) as f64;
    // Writing to a String cannot fail.
    let _ = writeln!(t, "model        {}", prepared.description);
    let _ = writeln!(t, "devices      {} ({} rank{})", names.join(", "), p.world, if p.world == 1 { "" } else { "s" });
    let _ = writeln!(
        t,
        "segment      {} in shared memory: exact fp32 master, {moments}, {gradients}; {per:.2} bytes a parameter",
        size(layout.bytes())
    );
    let _ = writeln!(t, "             {} pages of {} parameters", layout.page_count(), layout.page_parameters());
    let _ = writeln!(t, "device       {} of each ({} bytes)", size(u.total()), u.total());
    for (what, bytes) in [
        ("weights that stay", u.resident_weights),
        ("slots", u.slots),
        ("gradients", u.gradients),
        ("activations kept", u.activations),
        ("block inputs", u.boundaries),
        ("scratch", u.scratch),
        ("optimizer staging", u.optimizer),
        ("inputs, targets", u.inputs + u.tables),
    ] {
        let _ = writeln!(t, "  {what:<20} {:>12}", size(bytes));
    }
    let _ = writeln!(
        t,
        "step         {} group{} of up to {} micro-batch{} of {} x {} tokens a rank, {:?}",
        p.groups,
        if p.groups == 1 { "" } else { "s" },
        p.group_len,
        if p.group_len == 1 { "" } else { "es" },
        p.micro_batch,
        p.seq,
        p.dtype
    );
    let _ = writeln!(
        t,
        "             weights of {} of {} blocks stay on the device, {} are streamed through {} slots",
        count(&p.resident),
        model.len(),
        model.len() - count(&p.resident),
        p.slots
    );
    let _ = writeln!(t, "             activations of {} of {last} blocks are kept, the others recomputed", count(&p.keep[..last]));
    if p.optimizer_split {
        let spares = p.store.spare_pages_per_rank;
        let _ = writeln!(t, "             optimizer on the CPU and the device at once, {spares} spare pages a rank");
    }
    let kind = devices.first().map_or(DeviceKind::Cpu, |d| d.kind);
    let basis = if cost.measured { "rates measured on this node" } else { "typical rates, nothing measured" };
    let _ = writeln!(
        t,
        "time         {seconds:.3} s a step expected ({basis}): matrix products {:.3} s, copies {:.3} s{}, optimizer {:.3} s; bound by {}",
        cost.compute(model, p),
        cost.copies(model, p),
        if kind == DeviceKind::Cuda { " beside them" } else { "" },
        cost.optimizer(model),
        cost.bound_by(model, p)
    );
    t
}
