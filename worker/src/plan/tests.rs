//! The plan keeps to its budget, says what is missing, and its bytes are the bytes of the run.

use super::*;
use crate::session::Session;
use proptest::prelude::*;
use ramtorch_modelio::{StackConfig, TransformerConfig, parse_config};
use ramtorch_store::Store;
use std::path::Path;
use std::sync::Arc;

fn llama(layers: usize, tied: bool) -> Architecture {
    let text = format!(
        r#"{{"model_type":"llama","vocab_size":211,"hidden_size":48,"intermediate_size":80,"num_hidden_layers":{layers},
            "num_attention_heads":4,"num_key_value_heads":2,"max_position_embeddings":64,"rms_norm_eps":1e-5,
            "tie_word_embeddings":{tied},"hidden_act":"silu"}}"#
    );
    let config: TransformerConfig = parse_config(text.as_bytes(), Path::new("config.json")).unwrap().config;
    Architecture::Transformer(config)
}

fn request(architecture: &Architecture, world: usize, batch: usize, memory_bytes: u64, more: &str) -> PlanRequest {
    let text = format!(
        "name = \"t\"\n[model]\nconfig = \"/c\"\n[data]\nformat = \"tokens\"\ntrain = \"/t\"\nsequence_length = 16\n[train]\nsteps = 1\nbatch_size = {batch}\n{more}"
    );
    let spec = JobSpec::parse(&text, Path::new("/"), "job.toml").unwrap();
    PlanRequest {
        spec,
        prepared: Prepared {
            architecture: serde_json::to_value(architecture).unwrap(),
            description: architecture.describe(),
            weights: None,
            resume: None,
            train_sequences: 100,
            validation_sequences: 0,
            sequence_length: 16,
            steps: 1,
            dataset: serde_json::Value::Null,
            rates: Rates::default(),
        },
        devices: (0..world as u32)
            .map(|index| DeviceSpec { kind: DeviceKind::Cpu, index, threads: 1, memory_bytes, bus_id: None })
            .collect(),
        segment_bytes_available: 1 << 40,
        ram_bytes_available: 1 << 40,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_plan_fits_or_says_what_is_missing(budget in 1u64..6_000_000, world in 1usize..5, batch in 1usize..20, layers in 1usize..5, tied: bool) {
        let a = llama(layers, tied);
        match plan(&request(&a, world, batch, budget, "")) {
            Ok(p) => {
                let e = EnginePlan::of(&p).unwrap();
                prop_assert!(e.uses.total() <= budget && p.device_bytes.iter().all(|b| *b == e.uses.total()));
                prop_assert!(e.groups * e.group_len >= e.micro_batches);
                prop_assert!(e.micro_batch * e.micro_batches >= batch.div_ceil(world));
                prop_assert!(e.resident.iter().all(|r| *r) || e.slots >= 2);
                // More memory is never slower.
                let richer = plan(&request(&a, world, batch, budget * 2, "")).unwrap();
                prop_assert!(richer.step_seconds <= p.step_seconds * 1.000_001);
            }
            Err(e) => {
                prop_assert_eq!(e.kind, ErrorKind::Resources);
                prop_assert!(e.message.contains("bytes are missing"), "{}", e.message);
                // What it asks for is enough.
                let need: u64 = e.message.split("needs at least ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
                prop_assert!(need > budget);
                prop_assert!(plan(&request(&a, world, batch, need, "")).is_ok());
            }
        }
    }

    #[test]
    fn shares_cover_the_batch(batch in 0usize..100, world in 1usize..9) {
        let mut next = 0;
        for rank in 0..world {
            let share = rank_share(batch, rank, world);
            prop_assert_eq!(share.start, next);
            prop_assert!(share.len() <= batch.div_ceil(world));
            next = share.end;
        }
        prop_assert_eq!(next, batch);
    }
}

/// Slots and gradient buffers have room for equal shares, and the plan counts them.
#[test]
fn shares_are_in_the_bytes_of_the_plan() {
    let a = llama(3, false);
    for world in [2, 3, 8] {
        for (i, gather) in [true, false].into_iter().enumerate() {
            let more = format!("gather_weights = {gather}\n");
            let least = plan(&request(&a, world, 8, 1, &more)).unwrap_err().message;
            let least: u64 = least.split("needs at least ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
            for (j, budget) in [least, least * 20].into_iter().enumerate() {
                let p = EnginePlan::of(&plan(&request(&a, world, 8, budget, &more)).unwrap()).unwrap();
                assert_eq!(p.gather_weights, gather);
                assert_eq!(opened(&a, &p, &format!("shares-{world}-{i}-{j}")), p.uses.total(), "{p:?}");
            }
        }
    }
}

/// Several GPUs gather where they reach one another, and are planned to be nearly as many times as fast.
#[test]
fn gpus_share_the_loads_out_where_they_reach_one_another() {
    let a = llama_8b();
    let alone = plan(&on_gpu(&a, 2048, 8, 78.5, "")).unwrap().step_seconds;
    for world in [2usize, 4, 8] {
        let mut r = on_gpu(&a, 2048, 8 * world, 78.5, "");
        r.devices = (0..world as u32).map(|index| DeviceSpec { index, ..r.devices[0].clone() }).collect();
        for reach in [None, Some(false), Some(true)] {
            r.prepared.rates.peer_access = reach;
            let (p, text) = planned(&r);
            assert_eq!(p.gather_weights, reach == Some(true), "{}", text.text);
            assert!(p.uses.total() <= r.devices[0].memory_bytes);
            println!("{world} GPUs, {reach:?}: {:.2} of one\n{}", alone / text.step_seconds, text.text);
            assert!(reach != Some(true) || alone / text.step_seconds > 0.95, "{}", text.text);
            // What others gather from a device need not be in RAM; where each copies all weights, it has to be.
            assert_eq!(p.held_pages > 0, reach == Some(true), "{}", text.text);
        }
        let fast = planned(&r).1.step_seconds;
        // What was measured decides: over a slow link each had better copy everything; a faster one than typical promises nothing.
        r.prepared.rates.peer_bytes = 1.5e10;
        let (p, text) = planned(&r);
        assert!(!p.gather_weights && text.text.contains("15.0 GB/s"), "{}", text.text);
        r.prepared.rates.peer_bytes = 4e11;
        let (p, text) = planned(&r);
        assert!(p.gather_weights && text.step_seconds == fast, "{}", text.text);
        // What they do beside products decides before that: gathers that are fast and take little from arithmetic, or much of it.
        let works = Together {
            pull_bytes: 2.5e10,
            pull_products: 0.99,
            gather_bytes: 9e10,
            gather_products: 0.97,
            reduce_bytes: 9e10,
            reduce_products: 0.95,
        };
        r.prepared.rates.together = Some(works);
        let (p, text) = planned(&r);
        assert!(p.gather_weights && text.text.contains("gathered 90 GB/s (97 %)"), "{}", text.text);
        let quick = text.step_seconds;
        r.prepared.rates.together = Some(Together { reduce_bytes: 1e10, reduce_products: 0.6, ..works });
        assert!(planned(&r).1.step_seconds > 1.02 * quick);
        r.prepared.rates.together = Some(Together { gather_bytes: 2.6e10, gather_products: 0.8, ..works });
        assert!(!planned(&r).0.gather_weights);
        r.prepared.rates.together = None;
        r.spec.train.gather_weights = Some(false);
        assert!(!planned(&r).0.gather_weights);
    }
}

/// Opens a session for `p` and returns the bytes that its device gave out.
fn opened(a: &Architecture, p: &EnginePlan, name: &str) -> u64 {
    let name = format!("/ramtorch-plan-{name}-{}", std::process::id());
    let store = Arc::new(Store::create(&name, &p.store).unwrap());
    Store::unlink(&name).unwrap();
    let model = Model::new(a, store.layout(), p.dtype).unwrap();
    let spec = DeviceSpec { kind: DeviceKind::Cpu, index: 0, threads: 1, memory_bytes: p.uses.total(), bus_id: None };
    let dev = crate::device::open(&spec, p.dtype, p.uses.total(), true).unwrap();
    Session::new(dev, model, store, p, true).unwrap().dev.allocated()
}

#[test]
fn the_bytes_of_the_plan_are_the_bytes_of_the_run() {
    let stack = Architecture::Stack(StackConfig { widths: vec![10, 24, 24, 5], activation: Default::default(), loss: Default::default() });
    let mut seen = Vec::new();
    for (i, (a, more)) in [
        (llama(3, true), ""),
        (llama(3, false), "recompute = \"always\"\n"),
        (llama(4, true), "groups = 3\nmicro_batch_size = 2\n"),
        (llama(2, false), "precision = \"bf16\"\nmicro_batch_size = 3\n"),
        (llama(2, true), "gradients_in = \"device\"\n"),
        (llama(3, true), "gradients_in = \"device\"\nprecision = \"bf16\"\ngroups = 1\n"),
        (llama(3, false), "gradients_in = \"device\"\nprecision = \"bf16\"\ngroups = 3\nmicro_batch_size = 2\n"),
    ]
    .into_iter()
    .enumerate()
    {
        // From just enough to plenty: streamed and resident weights, kept and recomputed activations.
        let least = plan(&request(&a, 1, 8, 1, more)).unwrap_err().message;
        let least: u64 = least.split("needs at least ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        for (j, budget) in [least, least + least / 4, least * 2, least * 20].into_iter().enumerate() {
            let p = EnginePlan::of(&plan(&request(&a, 1, 8, budget, more)).unwrap()).unwrap();
            assert_eq!(opened(&a, &p, &format!("{i}-{j}")), p.uses.total(), "{p:?}");
            seen.push((p.resident.iter().filter(|r| **r).count(), p.keep.clone()));
        }
    }
    seen.sort_unstable();
    seen.dedup();
    assert!(seen.len() > 4, "the budgets gave only {seen:?}");
    let layout =
        Layout::new(&store_spec(&request(&stack, 1, 8, 1 << 30, "").spec, &request(&stack, 1, 8, 1, "").prepared, &stack, 1, Dtype::F32))
            .unwrap();
    assert!(Model::new(&stack, &layout, Dtype::F32).is_ok());
}

#[test]
fn too_small_a_segment_is_refused_with_the_bytes() {
    let mut r = request(&llama(2, true), 1, 4, 1 << 30, "");
    r.segment_bytes_available = 1000;
    let e = plan(&r).unwrap_err();
    assert_eq!(e.kind, ErrorKind::Resources);
    assert!(e.message.contains("1000 are free") && e.message.contains("are missing"), "{e}");
}

/// RAM in which checkpoints wait for the disk: half of what is left, never more than a checkpoint, as the job file says, and
/// counted among what the job takes.
#[test]
fn room_for_checkpoints_is_part_of_the_plan() {
    let a = llama(4, true);
    let of = |more: &str, ram: u64| {
        let mut r = request(&a, 2, 4, 1 << 30, more);
        (r.segment_bytes_available, r.ram_bytes_available) = (ram, ram);
        let p = plan(&r).unwrap();
        (EnginePlan::of(&p).unwrap().checkpoint_staging * 2, p.host_bytes, p)
    };
    let (none, without, p) = of("", 1 << 40);
    assert_eq!(none, 0, "no checkpoint can be written");
    let path = "[checkpoint]\npath = \"/x\"\n";
    let (whole, host, with) = of(path, 1 << 40);
    assert!(whole >= p.parameters * 12 && whole < p.parameters * 16 + (64 << 20), "all of it: {whole}");
    assert_eq!(host, without + whole);
    assert!(with.text.contains("of a checkpoint"), "{}", with.text);
    let (half, host, _) = of(path, p.segment_bytes + without + whole);
    assert!(half <= whole / 2 && half > 0 && host == without + half, "{half} of {whole}");
    assert_eq!(of(&format!("{path}staging_gib = 0\n"), 1 << 40).0, 0);
    assert_eq!(of(&format!("{path}staging_gib = 1000\n"), 1 << 40).0, whole);
}

/// Room for pages in flight stays small however many ranks there are, and the staging is in the plan.
#[test]
fn sharing_the_optimizer_costs_little_memory() {
    let text = r#"{"model_type":"llama","vocab_size":128256,"hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,
        "num_attention_heads":32,"num_key_value_heads":8,"max_position_embeddings":8192,"rms_norm_eps":1e-5,
        "tie_word_embeddings":false,"hidden_act":"silu"}"#;
    let a = Architecture::Transformer(parse_config(text.as_bytes(), Path::new("config.json")).unwrap().config);
    for world in [1, 4, 8] {
        let mut r = request(&a, world, 8, 70 << 30, "write_back_steps = 1\n");
        r.devices.iter_mut().for_each(|d| d.kind = DeviceKind::Cuda);
        let p = plan(&r).unwrap();
        let e = EnginePlan::of(&p).unwrap();
        assert!(e.optimizer_split && e.store.spare_pages_per_rank >= 3);
        let page = u64::from(e.store.page_parameters.unwrap());
        assert!(page >= 1 << 20, "{page}");
        // Weights, remainders, moments and gradients are 14 bytes a parameter.
        assert!((p.segment_bytes as f64) < 14.0 * 1.02 * p.parameters as f64, "{world} ranks: {} bytes", p.segment_bytes);
        assert_eq!(e.uses.optimizer, 2 * page * 14);
    }
    let e = EnginePlan::of(&plan(&request(&llama(2, true), 1, 4, 1 << 30, "")).unwrap()).unwrap();
    assert!(!e.optimizer_split && e.uses.optimizer == 0 && e.store.spare_pages_per_rank == 1);
}

/// A decoder of a known model's shape.
fn shape(
    family: &str,
    hidden: usize,
    inner: usize,
    layers: usize,
    heads: [usize; 2],
    head_dim: usize,
    vocab: usize,
    tied: bool,
) -> Architecture {
    let [heads, kv] = heads;
    let text = format!(
        r#"{{"model_type":"{family}","vocab_size":{vocab},"hidden_size":{hidden},"intermediate_size":{inner},"num_hidden_layers":{layers},
            "num_attention_heads":{heads},"num_key_value_heads":{kv},"head_dim":{head_dim},"max_position_embeddings":32768,
            "rms_norm_eps":1e-5,"tie_word_embeddings":{tied},"hidden_act":"silu"}}"#
    );
    Architecture::Transformer(parse_config(text.as_bytes(), Path::new("config.json")).unwrap().config)
}

fn llama_8b() -> Architecture {
    shape("llama", 4096, 14_336, 32, [32, 8], 128, 128_256, false)
}

/// A job on one GPU of `gib` GiB.
fn on_gpu(a: &Architecture, seq: usize, batch: usize, gib: f64, more: &str) -> PlanRequest {
    let mut r = request(a, 1, batch, (gib * (1u64 << 30) as f64) as u64, more);
    r.prepared.sequence_length = seq;
    r.devices[0].kind = DeviceKind::Cuda;
    r
}

fn planned(r: &PlanRequest) -> (EnginePlan, Plan) {
    let p = plan(r).unwrap_or_else(|e| panic!("{e}"));
    (EnginePlan::of(&p).unwrap(), p)
}

/// Typical rates, with norms after all gradients and pages updated on the processor alone at `adamw` parameters a second where that is given.
fn cost(a: &Architecture, adamw: Option<f64>) -> (Model, Cost) {
    let r = on_gpu(a, 2048, 8, 80.0, "");
    let layout = Layout::new(&store_spec(&r.spec, &r.prepared, a, 1, Dtype::Bf16)).unwrap();
    let mut c = Cost::new(Rates::default(), DeviceKind::Cuda, Dtype::Bf16, 4, true, 1);
    if let Some(adamw) = adamw {
        (c.adamw, c.adamw_gpu, c.norm_beside) = (adamw, 0.0, false);
    }
    (Model::new(a, &layout, Dtype::Bf16).unwrap(), c)
}

fn parts(a: &Architecture, p: &EnginePlan, adamw: Option<f64>) -> cost::Breakdown {
    let (model, c) = cost(a, adamw);
    let t = c.times(&model, p.micro_batch * p.seq, p.seq, p.head_rows);
    c.step(&model, p, &t)
}

/// Steps that were measured on one H100 with AdamW at 2.7 Gparameters/s and micro-batches of two sequences in four groups.
#[test]
fn measured_steps_are_predicted() {
    for (what, a, seconds, waited) in
        [("1B", shape("llama", 2048, 8192, 16, [32, 8], 64, 128_256, true), 0.74, 0.45), ("8B", llama_8b(), 5.10, 2.98)]
    {
        let (p, _) = planned(&on_gpu(&a, 2048, 8, 78.5, "micro_batch_size = 2\ngroups = 4\nheld_state_gib = 0\n"));
        let x = parts(&a, &p, Some(2.7e9));
        println!("{what}: {x:?}");
        assert!((x.step / seconds - 1.0).abs() < 0.15, "{what}: {:.2} s predicted, {seconds} s measured", x.step);
        assert!(
            (x.wait_optimizer / waited - 1.0).abs() < 0.15,
            "{what}: {:.2} s of waiting predicted, {waited} s measured",
            x.wait_optimizer
        );
    }
}

/// What was measured on H100s: times of layers by rows in milliseconds, rates of the bus, alone and both at once, and of the
/// processor's AdamW and norm.
fn measured(layers: &[(usize, [f64; 4])], bus: [f64; 4], processor: [f64; 2]) -> Rates {
    let point = |&(rows, ms): &(usize, [f64; 4])| {
        let [forward, backward, rebuild, recompute] = ms.map(|x| x * 1e-3);
        LayerTimes { rows, forward, backward, rebuild, recompute }
    };
    let gpu = GpuRates {
        layers: layers.iter().map(point).collect(),
        head: (8192, 0.0345),
        memory_bytes: 2.85e12,
        launch_seconds: 4.3e-6,
        to_device: bus[0],
        from_device: bus[1],
        both: [bus[2], bus[3]],
        ..Default::default()
    };
    Rates { gpu: Some(gpu), optimizer_parameters: processor[0], norm_parameters: processor[1], ..Default::default() }
}

/// A plan with these rates, and what they say of any plan.
fn with_rates(r: &mut PlanRequest, rates: &Rates, a: &Architecture) -> (EnginePlan, impl Fn(&EnginePlan) -> cost::Breakdown + use<>) {
    r.prepared.rates = rates.clone();
    let (model, _) = cost(a, None);
    let c = Cost::new(rates.clone(), DeviceKind::Cuda, Dtype::Bf16, 4, true, 1);
    let (p, plan) = planned(r);
    println!("{}", plan.text);
    (p, move |p| c.step(&model, p, &c.times(&model, p.micro_batch * p.seq, p.seq, p.head_rows)))
}

/// 8B with 131,072 tokens a step. Arithmetic under the limit of power, 5.9 ms a layer forward, leaves a block of 436 MB (8.06 ms) no
/// time where three streamed blocks in a row share two slots: it waited 2.05 ms for the third of each such run, and 0.28 s in all
/// with what came unevenly.
#[test]
#[allow(clippy::approx_constant)] // 3.14 ms
fn weights_wait_for_slots_as_they_did() {
    let a = llama_8b();
    let layers = [(2048, [1.34, 3.14, 0.09, 1.02]), (8192, [5.13, 11.55, 0.68, 4.35]), (32_768, [22.29, 46.45, 2.90, 16.76])];
    let rates = measured(&layers, [5.41e10, 4.81e10, 5.07e10, 4.48e10], [5.11e9, 43.4e9]);
    let (p, of) = with_rates(&mut on_gpu(&a, 2048, 64, 78.56, ""), &rates, &a);
    assert!(of(&p).wait_copies < 0.01 * of(&p).step, "{:?}", of(&p));

    let (model, _) = cost(&a, None);
    let taken = EnginePlan {
        resident: search::resident(&model, 11),
        slots: 2,
        groups: 16,
        group_len: 1,
        micro_batch: 4,
        resident_gradients: true,
        keep: vec![Keep::All; model.len()],
        ..p
    };
    let x = of(&taken);
    assert!((0.1..0.3).contains(&x.wait_copies), "{x:?}");
}

/// 7B with 131,072 tokens a step on an H200: 274 pages are on the GPU before their update, which came to 163 of them. The optimizer took
/// 1.03 s, 0.37 s of it seen, in a step of 9.91 s; 0.81 and 0.11 s were expected when all of the 274 were thought to be the GPU's. With
/// state that visits where sums of gradients were, the plan is faster.
#[test]
fn what_is_on_the_gpu_counts_for_pages_that_it_updates() {
    let a = shape("qwen2", 3584, 18_944, 28, [28, 4], 128, 152_064, false);
    let layers = [(1024, [0.82, 2.01, 0.13, 0.59]), (32_768, [24.27, 50.03, 1.95, 19.22])];
    let rates = measured(&layers, [5.45e10, 4.88e10, 5.16e10, 4.53e10], [5.15e9, 49.1e9]);
    let (p, of) = with_rates(&mut on_gpu(&a, 1024, 128, 138.8, ""), &rates, &a);
    let visited = of(&p);
    let (model, _) = cost(&a, None);
    let layer = |b: usize| matches!(model.blocks[b], Block::Layer(_));
    let taken = EnginePlan {
        resident: search::resident(&model, 2),
        slots: 2,
        groups: 4,
        group_len: 1,
        micro_batch: 32,
        keep: vec![Keep::Products; model.len()],
        held_pages: 38,
        visiting_pages: 0,
        held_gradients: Vec::new(),
        staged_pages: (0..model.len() - 1).map(|b| if layer(b) { 274 / 28 } else { 0 }).collect(),
        ..p.clone()
    };
    let x = of(&taken);
    assert!((x.optimizer / 1.03 - 1.0).abs() < 0.1 && (x.step / 9.91 - 1.0).abs() < 0.03, "{x:?}");
    assert!((0.2..0.45).contains(&x.wait_optimizer), "{x:?}");
    assert!(p.visiting_pages > 40 && visited.step < 0.995 * x.step && visited.wait_optimizer < 0.75 * x.wait_optimizer, "{visited:?}");
}

/// 7B with 131,072 tokens a step in four groups whose gradients add up in the segment, in pieces that wait for products:
/// 1.66 s of waiting for a buffer, in 11.9 s where 11.8 with none was expected. Sums that stay on the device, in 16 groups, took 10.5 s.
#[test]
fn gradients_that_add_up_in_the_segment_wait_for_products() {
    let a = shape("qwen2", 3584, 18_944, 28, [28, 4], 128, 152_064, false);
    let layers = [(1024, [0.74, 2.07, 0.05, 0.53]), (32_768, [23.44, 47.98, 5.20, 17.29])];
    let rates = measured(&layers, [5.38e10, 4.78e10, 4.90e10, 4.47e10], [5.46e9, 40.4e9]);
    let (p, of) = with_rates(&mut on_gpu(&a, 1024, 128, 78.56, ""), &rates, &a);
    assert!(p.resident_gradients && of(&p).wait_gradients < 0.01, "{:?}", of(&p));
    let taken = EnginePlan {
        groups: 4,
        group_len: 1,
        micro_batch: 32,
        resident_gradients: false,
        keep: vec![Keep::Products; p.keep.len()],
        staged_pages: vec![6; p.keep.len() - 1],
        held_pages: 0,
        visiting_pages: 0,
        held_gradients: Vec::new(),
        ..p
    };
    let x = of(&taken);
    // The bus out was busy for 9.2 s. Arithmetic, expected to be slower than it was, waits for less of that.
    assert!((8.5..9.9).contains(&x.copies_out) && (0.7..2.0).contains(&x.wait_gradients), "{x:?}");
}

#[test]
fn a_model_that_fits_a_gpu_is_not_streamed_for_want_of_memory() {
    let a = shape("llama", 1024, 4096, 16, [16, 8], 64, 32_000, false);
    for batch in [8, 64] {
        let (p, plan) = planned(&on_gpu(&a, 1024, batch, 78.5, ""));
        assert!(p.keep.iter().all(|k| *k == Keep::All), "{}", plan.text);
        let x = parts(&a, &p, None);
        let everything = EnginePlan {
            resident: vec![true; p.resident.len()],
            slots: 0,
            resident_gradients: true,
            held_pages: 0,
            visiting_pages: 0,
            held_gradients: Vec::new(),
            ..p
        };
        let y = parts(&a, &everything, None);
        // No cliff: what was chosen is at least as fast as having everything on the device.
        assert!(x.step <= y.step * 1.000_001, "{x:?} {y:?}");
        assert!(x.wait_copies < 0.02 * x.step, "{x:?}");
    }
}

#[test]
fn large_steps_and_small_gpus_find_their_plans() {
    let a = llama_8b();
    let qwen = shape("qwen2", 3584, 18_944, 28, [28, 4], 128, 152_064, false);
    for (what, a, seq, batch, gib) in
        [("8B", &a, 2048, 8, 78.5), ("8B", &a, 2048, 64, 78.5), ("7B", &qwen, 1024, 128, 78.5), ("8B", &a, 2048, 8, 23.0)]
    {
        let begin = std::time::Instant::now();
        let (p, plan) = planned(&on_gpu(a, seq, batch, gib, "held_state_gib = 0\n"));
        let x = parts(a, &p, None);
        println!("{what} {seq} x {batch} on {gib} GiB in {:?}: {:.0} tok/s\n{}", begin.elapsed(), (seq * batch) as f64 / x.step, plan.text);
        assert!(x.wait_copies + x.wait_gradients < 0.05 * x.step, "{}", plan.text);
        assert!(p.micro_batch * p.seq >= 8192, "{}", plan.text);
        // Plenty of memory: at most a little is computed twice.
        assert!(p.held_pages == 0 && (gib < 40.0 || x.again < 0.06 * x.compute), "{}", plan.text);
        // What state that stays takes from activations comes back.
        let (p, plan) = planned(&on_gpu(a, seq, batch, gib, ""));
        println!("with state that stays: {}", plan.text);
        assert!(parts(a, &p, None).step <= x.step, "{}", plan.text);
        let (stays, visits) = (plan.text.contains("stays on the device too"), plan.text.contains("comes with the backward pass"));
        assert!(gib < 40.0 || stays || visits, "{}", plan.text);
        assert_eq!((stays, visits), (p.held_pages > 0, p.visiting_pages > 0), "{}", plan.text);
    }
    // A card too small for any of it says so; one that is large enough by a hair does not.
    let e = plan(&on_gpu(&a, 2048, 8, 2.0, "")).unwrap_err().message;
    let need: f64 = e.split("needs at least ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(plan(&on_gpu(&a, 2048, 8, need / (1u64 << 30) as f64, "")).is_ok());
}

/// Where RAM is short, gradients stay on the GPU, whatever else has to give way; not where the job says otherwise, and not on
/// several GPUs.
#[test]
fn gradients_that_have_no_room_in_ram_stay_on_the_gpu() {
    let a = shape("qwen2", 5120, 13_824, 48, [40, 8], 128, 152_064, false);
    let of = |more: &str, ram_gib: u64| {
        let mut r = on_gpu(&a, 1024, 64, 78.5, &format!("{more}[optimizer]\nmoments = \"bf16\"\n"));
        r.segment_bytes_available = ram_gib << 30;
        r
    };
    let (p, text) = planned(&of("", 113));
    println!("{}", text.text);
    assert!(text.segment_bytes < 112 << 30 && p.store.gradients == GradientFormat::None, "{}", text.text);
    assert!(p.device_gradients.is_some() && p.squares() && !p.packs() && p.uses.total() <= of("", 113).devices[0].memory_bytes);
    assert!(p.uses.gradients >= 2 * text.parameters && text.host_bytes > 0);
    assert!(text.text.contains("stay on the device") && text.text.contains("goes back to the last checkpoint"), "{}", text.text);
    let (roomy, _) = planned(&of("", 200));
    assert!(roomy.device_gradients.is_none() && roomy.store.gradients == GradientFormat::Bf16);
    // One group: rounded once, as on the way to the segment.
    let (one, _) = planned(&of("groups = 1\ngradients_in = \"device\"\n", 200));
    assert!(one.device_gradients == Some(GradientFormat::Bf16) && !one.resident_gradients);
    let e = plan(&of("gradients_in = \"segment\"\n", 113)).unwrap_err();
    assert!(e.kind == ErrorKind::Resources && e.message.contains("are missing") && e.message.contains("gradients_in"), "{e}");
    for more in ["", "gradients_in = \"device\"\n"] {
        let mut r = of(more, 113);
        r.devices = (0..2).map(|index| DeviceSpec { index, ..r.devices[0].clone() }).collect();
        let e = plan(&r).unwrap_err();
        assert!(e.kind == ErrorKind::Resources && e.message.contains("gradients"), "{e}");
    }
    // The memory of a CPU device is the same RAM.
    let mut r = request(&llama(2, true), 1, 4, 1 << 30, "");
    r.segment_bytes_available = plan(&r).unwrap().segment_bytes - 4096;
    assert!(plan(&r).unwrap_err().message.contains("4096 bytes are missing"));
}

/// 14B with 65,536 tokens a step on an H200, in two groups: 424 of 881 pages came to the GPU, those of layers that keep much, and none of
/// the embedding's; the forward pass waited 0.32 s for its first two blocks.
#[test]
fn pages_of_layers_that_keep_little_come_to_what_others_leave() {
    let a = shape("qwen2", 5120, 13_824, 48, [40, 8], 128, 152_064, false);
    let layers = [(1024, [0.90, 2.34, 0.09, 0.72]), (8192, [7.0, 14.8, 0.65, 5.5]), (32_768, [27.47, 57.05, 1.47, 20.81])];
    let rates = measured(&layers, [5.36e10, 4.86e10, 4.86e10, 4.53e10], [4.8e9, 41.2e9]);
    let mut r = on_gpu(&a, 1024, 64, 138.8, "[optimizer]\nmoments = \"bf16\"\n");
    r.segment_bytes_available = 113 << 30;
    r.prepared.rates = rates;
    let (p, plan) = planned(&r);
    println!("{}", plan.text);
    let staged: usize = p.staged_pages.iter().sum();
    assert!((500..700).contains(&staged), "{:?}", p.staged_pages);
    let little: Vec<usize> = (3..48).filter(|b| p.keep[*b] == Keep::Inputs).collect();
    assert!(little.len() > 5 && little.iter().all(|b| p.staged_pages[*b] > 8), "{:?} {:?}", p.keep, p.staged_pages);
    // The last visits are short: what is the embedding's has come before.
    assert_eq!(p.staged_pages[0], 0);
    assert!((9.9..10.3).contains(&plan.step_seconds), "{}", plan.step_seconds);
}

/// Without clipping, pages are updated beside the backward pass, where the place of their gradients has room for their weights.
#[test]
fn what_is_not_clipped_is_updated_early() {
    let of = |a: &Architecture, more: &str| planned(&on_gpu(a, 2048, 64, 78.5, more));
    let a = llama_8b();
    let (late, slower) = of(&a, "");
    let (early, faster) = of(&a, "[optimizer]\nclip_norm = 0.0\n");
    assert!(!late.early_updates && early.early_updates);
    assert!(faster.step_seconds < slower.step_seconds, "{} and {}", faster.step_seconds, slower.step_seconds);
    assert!(faster.text.contains("beside the backward pass too") && !slower.text.contains("not clipped"));
    // Squares are kept behind what collectives use; on one rank, of pages.
    assert!(early.store.exchange_bytes >= 8 * 32 && early.store.exchange_bytes % 4096 == 0 && late.store.exchange_bytes == 0);
    for more in ["gradients_in = \"device\"\n", "precision = \"fp32\"\ngradients = \"bf16\"\n"] {
        let (p, plan) = of(&shape("llama", 1024, 4096, 4, [16, 8], 64, 32_000, false), &format!("{more}[optimizer]\nclip_norm = 0.0\n"));
        assert!(!p.early_updates && plan.text.contains("pages wait for the end of the backward pass"), "{}", plan.text);
    }
    assert!(!of(&a, "[optimizer]\nclip_norm = 0.0\nearly_updates = false\n").0.early_updates);
    let kept = |world| {
        let job = |more: &str| planned(&request(&llama(3, true), world, 8, 1 << 30, &format!("[optimizer]\nclip_norm = 0.0\n{more}"))).0;
        // The processor has enough to do: only where the job asks for it.
        assert!(!job("").early_updates && !job("early_updates = false\n").early_updates);
        let p = job("early_updates = true\n");
        assert!(p.early_updates);
        p.store.exchange_bytes - Collectives::exchange_bytes(world)
    };
    assert_eq!((kept(1), kept(2)), (4096, 4096));
}

#[test]
fn forced_recomputation_keeps_its_meaning() {
    let a = llama_8b();
    let (always, _) = planned(&on_gpu(&a, 2048, 8, 78.5, "recompute = \"always\"\n"));
    assert!(always.keep[1..33].iter().all(|k| *k == Keep::Inputs));
    let (never, _) = planned(&on_gpu(&a, 2048, 8, 78.5, "recompute = \"never\"\n"));
    assert!(never.keep.iter().all(|k| *k == Keep::All));
    let (auto, _) = planned(&on_gpu(&a, 2048, 8, 60.0, "groups = 1\nheld_state_gib = 0\n"));
    assert!(auto.keep.contains(&Keep::Products));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn more_memory_is_never_slower_on_a_gpu(gib in 4f64..40.0, more in 1f64..2.0, batch in 1usize..40, layers in 1usize..20, tied: bool, hold: bool) {
        let a = shape("llama", 2048, 8192, layers, [32, 8], 64, 50_000, tied);
        let hold = if hold { "" } else { "held_state_gib = 0\n" };
        let r = on_gpu(&a, 1024, batch, gib, hold);
        if let Ok(p) = plan(&r) {
            let e = EnginePlan::of(&p).unwrap();
            prop_assert!(e.uses.total() <= r.devices[0].memory_bytes && p.device_bytes == [e.uses.total()]);
            prop_assert!(e.groups * e.group_len >= e.micro_batches && e.micro_batch * e.micro_batches >= batch);
            prop_assert!(e.resident.iter().all(|r| *r) || e.slots >= 2);
            let richer = plan(&on_gpu(&a, 1024, batch, gib * more, hold)).unwrap();
            // What a longer log gains has to be worth its RAM: a plan may give that little up for a shorter one.
            let worth = 1.0 + search::LOG_WORTH * f64::from(e.store.log.steps - 1);
            prop_assert!(richer.step_seconds <= p.step_seconds * worth * 1.000_001, "{} then {}", p.step_seconds, richer.step_seconds);
        }
    }
}

/// On an H200, as it was measured: a model whose state fits the GPU is bound by its arithmetic; what the bus could not carry at
/// every step, it carries at some.
#[test]
fn a_log_of_gradients_takes_the_bus_away_as_the_bound() {
    let small = shape("llama", 3072, 8192, 28, [24, 8], 128, 128_256, true);
    let layers = [(2048, [0.71, 1.60, 0.02, 0.55]), (4096, [1.29, 2.77, 0.09, 1.04]), (16_384, [4.97, 10.40, 1.08, 3.87])];
    let rates = measured(&layers, [4.54e10, 4.84e10, 4.43e10, 4.43e10], [4.79e9, 38.1e9]);
    let ram = |r: &mut PlanRequest, gib: u64| (r.segment_bytes_available, r.ram_bytes_available) = (gib << 30, gib << 30);
    let of = |more: &str| {
        let mut r = on_gpu(&small, 2048, 8, 138.8, more);
        ram(&mut r, 122);
        let (p, of) = with_rates(&mut r, &rates, &small);
        (of(&p), p)
    };
    let (without, p) = of("write_back_steps = 1\n");
    assert!(p.store.log == GradientLog::NONE && p.held_pages > 0);
    let (with, p) = of("");
    assert!(
        p.store.log.steps > 2 && p.held_pages > 150 && Layout::new(&p.store).unwrap().logged_parameters() > 16 << 30 >> 4,
        "{:?}",
        p.store.log
    );
    assert!(with.step < 1.15 * with.compute && with.step < 0.85 * without.step, "{with:?} and without a log {without:?}");
    assert_eq!(of("write_back_steps = 3\n").1.store.log.steps, 3);
    // Where there is as much RAM as the rest takes, there is no log; where there is little more, it has half of that.
    let a = llama_8b();
    let layers = [(2048, [1.33, 3.05, 0.06, 1.00]), (8192, [5.01, 11.01, 1.07, 4.30]), (32_768, [22.34, 47.40, 2.29, 17.17])];
    let rates = measured(&layers, [5.39e10, 4.73e10, 5.09e10, 4.47e10], [4.89e9, 33.9e9]);
    let mut seconds = Vec::new();
    for gib in [106, 112, 122, 200] {
        let mut r = on_gpu(&a, 2048, 8, 138.8, "");
        ram(&mut r, gib);
        let (p, of) = with_rates(&mut r, &rates, &a);
        let bytes = |log: GradientLog| Layout::new(&StoreSpec { log, ..p.store.clone() }).unwrap().bytes();
        let (all, base) = (bytes(p.store.log.clone()), bytes(GradientLog::NONE));
        assert!(all <= gib << 30 && all - base <= ((gib << 30) - base) / 2 + (1 << 20), "{:?}", p.store.log);
        seconds.push(of(&p).step);
    }
    assert!(seconds.is_sorted_by(|a, b| *b <= a * 1.015) && seconds[3] < 0.85 * seconds[0], "{seconds:?}");
}

proptest! {
    #[test]
    fn measured_points_are_met_and_joined(rows in 256usize..65_536) {
        let a = llama_8b();
        let (model, _) = cost(&a, None);
        let point = |rows: usize, slow: f64| LayerTimes { rows, forward: 1e-6 * slow * rows as f64, backward: 2e-6 * slow * rows as f64, rebuild: 1e-7 * rows as f64, recompute: 9e-7 * slow * rows as f64 };
        let gpu = GpuRates { layers: vec![point(1024, 1.5), point(4096, 1.2), point(16_384, 1.0)], head: (4096, 0.01), ..Default::default() };
        let c = Cost::new(Rates { gpu: Some(gpu), ..Default::default() }, DeviceKind::Cuda, Dtype::Bf16, 4, true, 1);
        let per = |rows: usize| c.times(&model, rows, 256, 4096).forward[5] / rows as f64 / cost::SUSTAINED;
        if (1024..=16_384).contains(&rows) {
            prop_assert!(per(rows) <= 1.5e-6 * 1.000_001 && per(rows) >= 1e-6 * 0.999_999);
        }
        // Beyond the points too: few rows cost more each.
        prop_assert!(per(rows) <= per((rows / 2).max(1)) * 1.000_001);
        prop_assert!(per(512) > 1.5e-6 * 1.02 && per(65_536) > 0.9e-6);
        prop_assert!((per(4096) - 1.2e-6).abs() < 1e-12);
    }
}

/// Evaluating a model that does not fit: layers are streamed and not the ends, and every load serves several micro-batches.
#[test]
fn evaluation_streams_layers_for_several_micro_batches() {
    for tied in [false, true] {
        let a = llama(6, tied);
        let blocks = a.blocks();
        let store = StoreSpec {
            blocks,
            world_size: 1,
            moments: MomentFormat::None,
            gradients: GradientFormat::None,
            page_parameters: None,
            spare_pages_per_rank: 1,
            exchange_bytes: 0,
            log: GradientLog::NONE,
            metadata: String::new(),
        };
        let model = Model::new(&a, &Layout::new(&store).unwrap(), Dtype::F32).unwrap();
        let inference = |budget: u64, most: usize| inference(&model, &store, 2, 16, budget, DeviceKind::Cpu, most);
        let whole = inference(64 << 20, 40).unwrap();
        assert!(whole.resident.iter().all(|stays| *stays) && whole.group_len == 1 && whole.slots == 0);
        let refused = inference(0, 40).unwrap_err().message;
        let least: u64 = refused.split(' ').next().unwrap().parse().unwrap();
        let smallest = inference(least, 40).unwrap();
        assert!(smallest.resident.iter().all(|stays| !*stays) && smallest.group_len == 1, "{smallest:?}");
        for budget in (least..whole.uses.total()).step_by(5_000) {
            let p = inference(budget, 5).unwrap();
            assert!(p.uses.total() <= budget && p.group_len <= 5 && p.micro_batches == p.group_len);
            let streamed: Vec<usize> = (0..model.len()).filter(|b| !p.resident[*b]).collect();
            // A layer stays only where both ends do.
            let ends = p.resident[0] && p.resident[model.len() - 1];
            assert!(ends || streamed.len() >= model.len() - 1, "{streamed:?}");
            if budget > least + 40_000 {
                assert!(p.group_len > 1, "{budget}: {streamed:?}");
            }
        }
    }
}
