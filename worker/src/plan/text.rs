//! The plan in words.

use super::cost::{Basis, Cost};
use super::search::Found;
use crate::api::{DeviceKind, DeviceSpec, Prepared};
use crate::model::{Block, Keep, Model};
use ramtorch_device::state_bytes;
use ramtorch_store::{GradientFormat, Layout, MomentFormat};
use std::fmt::Write;

fn size(bytes: u64) -> String {
    match bytes {
        0..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.2} GiB", bytes as f64 / 1_073_741_824.0),
    }
}

fn s(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

pub(crate) fn describe(
    model: &Model,
    layout: &Layout,
    found: &Found,
    devices: &[DeviceSpec],
    prepared: &Prepared,
    budget: u64,
    cost: &Cost,
    forced: bool,
) -> String {
    let (mut t, p) = (String::new(), &found.plan);
    let moments = match p.store.moments {
        MomentFormat::None => "no moments",
        MomentFormat::F32 => "fp32 moments",
        MomentFormat::Bf16 => "bf16 moments",
    };
    let gradients = match p.store.gradients {
        GradientFormat::None if p.device_gradients.is_some() => "gradients stay on the device",
        GradientFormat::None => "no gradients",
        GradientFormat::F32 => "fp32 gradients",
        GradientFormat::Bf16 => "bf16 gradients",
    };
    let names: Vec<String> = devices.iter().map(|d| d.to_string()).collect();
    let u = &p.uses;
    let per = layout.bytes() as f64 / layout.parameters().max(1) as f64;
    // Writing to a String cannot fail.
    let _ = writeln!(t, "model        {}", prepared.description);
    let _ = writeln!(t, "devices      {} ({} rank{})", names.join(", "), p.world, s(p.world));
    let _ = writeln!(
        t,
        "segment      {} in shared memory: exact fp32 master, {moments}, {gradients}; {per:.2} bytes a parameter",
        size(layout.bytes())
    );
    let _ = writeln!(t, "             {} pages of {} parameters", layout.page_count(), layout.page_parameters());
    let _ = writeln!(t, "device       {} of each ({} bytes), {} are given", size(u.total()), u.total(), size(budget));
    for (what, bytes) in [
        ("weights that stay", u.resident_weights),
        ("slots", u.slots),
        ("gradients", u.gradients),
        ("activations kept", u.activations),
        ("block inputs", u.boundaries),
        ("scratch", u.scratch),
        ("optimizer staging", u.optimizer),
        ("optimizer state that stays", u.held),
        ("inputs, targets", u.inputs + u.tables),
        ("driver, libraries", u.libraries),
    ] {
        if bytes > 0 {
            let _ = writeln!(t, "  {what:<20} {:>12}", size(bytes));
        }
    }
    if p.checkpoint_staging > 0 {
        let (each, all) = (p.checkpoint_staging, layout.span() * state_bytes(&p.store));
        let staged = each * p.world as u64;
        let share = 100.0 * staged as f64 / all.max(1) as f64;
        let _ = writeln!(t, "host         {} of RAM beside it hold {share:.0} % of a checkpoint until it is on the disk", size(staged));
    }
    choice(&mut t, model, layout, found, forced);
    time(&mut t, found, devices.first().map_or(DeviceKind::Cpu, |d| d.kind), prepared, cost);
    t
}

/// What was chosen, and why.
fn choice(t: &mut String, model: &Model, layout: &Layout, found: &Found, forced: bool) {
    let p = &found.plan;
    let _ = writeln!(
        t,
        "step         {} group{} of up to {} micro-batch{} of {} x {} tokens a rank, {:?}",
        p.groups,
        s(p.groups),
        p.group_len,
        if p.group_len == 1 { "" } else { "es" },
        p.micro_batch,
        p.seq,
        p.dtype
    );
    let stay = p.resident.iter().filter(|r| **r).count();
    let streamed = model.len() - stay;
    if streamed == 0 {
        let _ =
            writeln!(t, "             all {} blocks' weights stay on the device: each crosses once a step, after its update", model.len());
    } else {
        let _ = writeln!(
            t,
            "             weights of {stay} of {} blocks stay on the device, {streamed} are streamed through {} slots, {} times a step",
            model.len(),
            p.slots,
            2 * p.groups
        );
    }
    if p.world > 1 {
        let wire = if p.packs() { "bf16" } else { "fp32" };
        let loads = if p.gather_weights {
            "each rank copies its share of a block, the devices gather the shares"
        } else {
            "each rank copies every block whole"
        };
        let _ = writeln!(t, "             {loads}; gradients are added up between the devices in {wire}, each rank sends its share out");
    }
    let layers: Vec<Keep> = (0..model.len() - 1).filter(|b| !matches!(model.blocks[*b], Block::Embed(_))).map(|b| p.keep[b]).collect();
    let count = |k: Keep| layers.iter().filter(|x| **x == k).count();
    let _ = writeln!(
        t,
        "             activations: {} layer{} keep all, {} keep products and attention (norms and activations are made again), {} keep their input only",
        count(Keep::All),
        s(count(Keep::All)),
        count(Keep::Products),
        count(Keep::Inputs)
    );
    if p.early_updates {
        let _ =
            writeln!(t, "             gradients are not clipped: the processor updates pages beside the backward pass too, as theirs come");
    }
    if p.optimizer_split {
        let spares = p.store.spare_pages_per_rank;
        let _ = writeln!(t, "             optimizer on the processor and the device at once, {spares} spare pages a rank");
        if p.held_pages > 0 {
            let _ = writeln!(
                t,
                "             the state of {} page{} stays on the device too: updated there at once, written back beside the next step",
                p.held_pages,
                s(p.held_pages)
            );
            let log = &p.store.log;
            if log.steps > 1 {
                let bytes = u64::from(log.steps - 1) * layout.logged_parameters() * p.store.gradients.bytes();
                let _ = writeln!(
                    t,
                    "             of these at every step one in {}: {} in the segment keep the gradients of the steps since, from which a death has them made again",
                    log.steps,
                    size(bytes)
                );
            }
        }
        if p.visiting_pages > 0 {
            let _ = writeln!(
                t,
                "             the state of {} more lies on the device while a step's sums of gradients do not: it comes with the backward pass and leaves before the next",
                p.visiting_pages
            );
        }
        if p.held_pages + p.visiting_pages > 0 && p.held_gradients.contains(&true) && p.packs() {
            let _ = writeln!(t, "             their gradients stay there too: all of them are updated before the next forward pass begins");
        }
        let staged: usize = p.staged_pages.iter().sum();
        if staged > 0 {
            let _ = writeln!(
                t,
                "             {staged} page{} come{} to the device during the backward pass, into activations that are done with",
                s(staged),
                if staged == 1 { "s" } else { "" }
            );
        }
    }
    if let Some(format) = p.device_gradients {
        let (kept, sums) = match format {
            GradientFormat::F32 => ("fp32", "summed where they stay"),
            _ if p.groups == 1 => ("bf16", "each block's sum is rounded once"),
            _ => ("bf16", "each group's sum is added and rounded"),
        };
        let forced = if forced { "as the job says" } else { "the RAM offered has no room for them" };
        let _ = writeln!(t, "             gradients stay on the device in {kept} until their step is committed ({forced}); {sums}");
        let _ = writeln!(
            t,
            "             a death while pages are updated goes back to the last checkpoint, or to the beginning where there is none; any other death loses nothing"
        );
    }
    let gradients = match (p.resident_gradients, p.groups) {
        _ if p.device_gradients.is_some() => "pages that the processor updates get theirs through three page-locked buffers",
        (true, 1) => "each block has its own gradient buffer: the backward pass never waits for one to be copied out",
        (true, _) => "gradients add up on the device and leave it with the last group",
        (false, 1) => "gradients leave through two buffers as blocks are done",
        (false, _) if p.store.gradients == GradientFormat::Bf16 => {
            "gradients leave with every group and add up in the segment, rounded after each (fp32 sums have no room on the device)"
        }
        (false, _) => "gradients leave with every group and add up in the segment",
    };
    let _ = writeln!(t, "             {gradients}");
    let why = match (p.groups, count(Keep::Inputs), streamed) {
        (1, 0, 0) => "everything fits: nothing is streamed, nothing recomputed as a whole",
        (1, 0, _) => "one group: weights are streamed as few times as can be, and nothing is recomputed as a whole",
        (1, _, _) => "one group: moving weights more often would cost more than recomputing",
        (_, 0, _) => "several groups: one group's activations fit, which saves recomputing",
        (_, _, _) => "several groups and some recomputation: the device's memory is short",
    };
    let _ = writeln!(t, "             {why}; fastest of {} combinations", found.played);
}

/// What it takes.
fn time(t: &mut String, found: &Found, kind: DeviceKind, prepared: &Prepared, cost: &Cost) {
    let x = &found.parts;
    let gpu = prepared.rates.gpu.as_ref();
    let basis = match cost.basis {
        Basis::Measured => "rates measured on this node".to_string(),
        Basis::Cached => format!("rates of this {} measured for an earlier job", gpu.map_or("GPU", |g| g.name.as_str())),
        Basis::Typical => "typical rates, nothing measured".to_string(),
    };
    let _ = writeln!(t, "time         {:.3} s a step expected ({basis}); bound by {}", x.step, x.bound_by());
    let _ = writeln!(t, "  arithmetic           {:>9.3} s, of it {:.3} s a second time", x.compute, x.again);
    let _ = writeln!(
        t,
        "  copies               {:>9.3} s in, {:.3} s out{}",
        x.copies_in,
        x.copies_out,
        if cost.overlapped() { ", beside the arithmetic" } else { "" }
    );
    let gpu_share = if cost.adamw_gpu > 0.0 { 100.0 * cost.adamw_gpu / (cost.adamw + cost.adamw_gpu) } else { 0.0 };
    let _ = writeln!(t, "  optimizer            {:>9.3} s, {gpu_share:.0} % of the pages on the GPU; norm {:.3} s", x.optimizer, x.norm);
    if kind == DeviceKind::Cuda {
        let hidden = (x.optimizer - x.wait_optimizer).max(0.0);
        let _ = writeln!(
            t,
            "  arithmetic waits     {:>9.3} s for the optimizer ({hidden:.3} s of it hidden by the next forward pass), {:.3} s for weights, {:.3} s for gradient buffers; {:.3} s after the last visit",
            x.wait_optimizer,
            x.wait_copies,
            x.wait_gradients,
            x.tail + x.wait_norm
        );
    }
    if let Some(together) = &prepared.rates.together {
        let gb = |x: f64| x / 1e9;
        let _ = writeln!(
            t,
            "together     all GPUs at once, and the speed of products meanwhile: blocks loaded by each {:.0} GB/s ({:.0} %), loaded by shares and gathered {:.0} GB/s ({:.0} %), fp32 gradients reduced {:.0} GB/s ({:.0} %)",
            gb(together.pull_bytes),
            100.0 * together.pull_products,
            gb(together.gather_bytes),
            100.0 * together.gather_products,
            gb(together.reduce_bytes),
            100.0 * together.reduce_products
        );
    }
    if prepared.rates.peer_bytes > 0.0 {
        let _ = writeln!(t, "peers        {:.1} GB/s from one GPU to the next, all at once", prepared.rates.peer_bytes / 1e9);
    }
    if let Some(g) = gpu {
        let _ = writeln!(
            t,
            "rates        {}: {:.1} GB/s in, {:.1} out, {:.1} + {:.1} both at once; device memory {:.0} GB/s; attention {:.0} and {:.0} TFLOP/s; launch {:.1} us",
            g.name,
            g.to_device / 1e9,
            g.from_device / 1e9,
            g.both[0] / 1e9,
            g.both[1] / 1e9,
            g.memory_bytes / 1e9,
            g.attention[0] / 1e12,
            g.attention[1] / 1e12,
            g.launch_seconds * 1e6
        );
        for r in &g.products {
            let _ = writeln!(
                t,
                "             products of {:>6} rows: {:.0}, {:.0}, {:.0} TFLOP/s (output, input gradient, weight gradient)",
                r[0],
                r[1] / 1e12,
                r[2] / 1e12,
                r[3] / 1e12
            );
        }
        for l in &g.layers {
            let _ = writeln!(
                t,
                "             a layer with {:>6} rows: forward {:.2} ms, backward {:.2} ms, norms and activations again {:.2} ms, all again {:.2} ms",
                l.rows,
                l.forward * 1e3,
                l.backward * 1e3,
                l.rebuild * 1e3,
                l.recompute * 1e3
            );
        }
        let _ = writeln!(
            t,
            "             processor: AdamW {:.2}, norm {:.1} Gparameters/s",
            prepared.rates.optimizer_parameters / 1e9,
            prepared.rates.norm_parameters / 1e9
        );
    }
}
