//! What stays on the device, how many chunks go together and who has given a row up changes no text.

use super::*;
use crate::generate::tests::tiny;

const PROMPTS: [usize; 3] = [11, 4, 1];

fn prompts() -> Vec<Vec<u32>> {
    PROMPTS.iter().map(|n| (0..*n as u32).map(|t| (t * 29 + *n as u32 * 7) % 97).collect()).collect()
}

struct Opened {
    runner: Runner,
    streamed: usize,
}

fn open(tied: bool, dtype: Dtype, memory_bytes: u64) -> Result<Opened, EngineError> {
    let (architecture, store) = tiny(tied);
    let spec = DeviceSpec { kind: DeviceKind::Cpu, index: 0, threads: 1, memory_bytes, bus_id: None };
    let room = Room { prompts: 3, longest: 11, capacity: 16 };
    let runner = Runner::with_chunks(&spec, &architecture, &store, 0, dtype, room, 4)?;
    let streamed = runner.weights.stay().iter().filter(|stays| !**stays).count();
    Ok(Opened { runner, streamed })
}

/// The least memory that it runs with.
fn least(tied: bool, dtype: Dtype) -> u64 {
    let message = open(tied, dtype, 0).map(|_| ()).unwrap_err().message;
    let words: Vec<&str> = message.split(' ').collect();
    words[words.iter().position(|w| *w == "needs").unwrap() + 1].parse().unwrap()
}

fn decoded(runner: &mut Runner, tokens: &[u32]) -> Vec<u8> {
    runner.decode(tokens, |logits| Ok(logits.to_vec())).unwrap()
}

/// Logits after the prompts and after four tokens more.
fn logits(runner: &mut Runner) -> Vec<Vec<u8>> {
    let mut all = vec![runner.prefill(&prompts()).unwrap()];
    all.extend((0..4).map(|step| decoded(runner, &[step, 50 + step, 90 - step])));
    all
}

#[test]
fn memory_changes_no_bit() {
    for (tied, dtype) in [(true, Dtype::F32), (false, Dtype::F32), (false, Dtype::Bf16)] {
        let mut whole = open(tied, dtype, 64 << 20).unwrap();
        assert_eq!((whole.streamed, whole.runner.group), (0, 1));
        let expected = logits(&mut whole.runner);
        assert!(expected.iter().all(|l| l.len() == 3 * 97 * dtype.size() as usize));
        let least = least(tied, dtype);
        assert!(open(tied, dtype, least - 1).is_err());
        let mut smallest = open(tied, dtype, least).unwrap();
        assert_eq!((smallest.streamed, smallest.runner.group), (5, 1));
        assert!(logits(&mut smallest.runner) == expected, "{tied} {dtype:?}: with {least} bytes");
        // A little more, and the prompts' three chunks go through each block together.
        let more = least + 16_000;
        let mut together = open(tied, dtype, more).unwrap();
        assert!(together.streamed > 0 && together.runner.group == 3, "{} of 5, {}", together.streamed, together.runner.group);
        assert!(logits(&mut together.runner) == expected, "{tied} {dtype:?}: with {more} bytes");
    }
}

/// What a device is asked to keep of a sweep tells what the sweep does, bit for bit.
#[test]
fn a_sweep_to_keep_tells_the_same() {
    for (tied, dtype) in [(true, Dtype::F32), (false, Dtype::Bf16)] {
        let mut swept = open(tied, dtype, 64 << 20).unwrap().runner;
        let mut kept = open(tied, dtype, 64 << 20).unwrap().runner;
        assert!(kept.stays && !open(tied, dtype, least(tied, dtype)).unwrap().runner.stays);
        assert!(swept.prefill(&prompts()).unwrap() == kept.prefill(&prompts()).unwrap());
        let weights = kept.weights_that_stay().unwrap();
        for step in 0..3 {
            let tokens = [step, 50 + step, 90 - step];
            kept.put(kept.ids, tokens.into_iter()).unwrap();
            kept.put(kept.positions, kept.lengths.iter().map(|n| *n as u32)).unwrap();
            kept.put(kept.rows, 0..3).unwrap();
            let logits = kept.token(&weights, 3).unwrap();
            let mut told = Vec::new();
            kept.dev.read(Stream::Compute, logits, &mut |logits| told = logits.to_vec()).unwrap();
            kept.lengths.iter_mut().for_each(|n| *n += 1);
            assert!(told == decoded(&mut swept, &tokens), "{tied} {dtype:?}, token {step}");
        }
    }
}

#[test]
fn rows_that_stay_go_on_as_they_were() {
    let mut all = open(false, Dtype::F32, 64 << 20).unwrap().runner;
    let mut some = open(false, Dtype::F32, 64 << 20).unwrap().runner;
    assert!(all.prefill(&prompts()).unwrap() == some.prefill(&prompts()).unwrap());
    for step in 0..4 {
        if step == 1 {
            some.keep(&[0, 2]).unwrap();
        }
        if step == 3 {
            some.keep(&[1]).unwrap();
        }
        let next = [step, 40, 90 - step];
        let kept: &[usize] = match step {
            0 => &[0, 1, 2],
            1 | 2 => &[0, 2],
            _ => &[2],
        };
        let expected = decoded(&mut all, &next);
        let left = decoded(&mut some, &kept.iter().map(|i| next[*i]).collect::<Vec<_>>());
        let numbers = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect::<Vec<_>>();
        let expected: Vec<f32> = kept.iter().flat_map(|i| numbers(&expected[i * 97 * 4..][..97 * 4])).collect();
        for (got, want) in numbers(&left).iter().zip(&expected) {
            assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "step {step}: {got} for {want}");
        }
        assert_eq!(left.len(), kept.len() * 97 * 4);
    }
}
