//! A curve of any length in bounded memory.

/// Points kept; a terminal has a few hundred columns, so halving the resolution of a longer curve is never seen.
const CAPACITY: usize = 4096;

/// Values over steps. Beyond [`CAPACITY`] points neighbours are averaged, all over the curve alike.
#[derive(Debug, Clone)]
pub(crate) struct Series {
    points: Vec<(f64, f64)>,
    /// Values that make one point.
    stride: u32,
    /// Sum of steps, sum of values and number of the values that do not make a whole point yet.
    pending: (f64, f64, u32),
    first: Option<f64>,
    last: Option<f64>,
    not_finite: u64,
}

impl Default for Series {
    fn default() -> Self {
        Series { points: Vec::new(), stride: 1, pending: (0.0, 0.0, 0), first: None, last: None, not_finite: 0 }
    }
}

impl Series {
    /// Adds a value; one that is not finite is counted and left out of the curve.
    pub fn push(&mut self, step: u64, value: f64) {
        self.last = Some(value);
        self.first.get_or_insert(value);
        if !value.is_finite() {
            self.not_finite += 1;
            return;
        }
        let (steps, values, n) = self.pending;
        self.pending = (steps + step as f64, values + value, n + 1);
        if self.pending.2 < self.stride {
            return;
        }
        self.points.extend(self.pending_point());
        self.pending = (0.0, 0.0, 0);
        if self.points.len() == CAPACITY {
            self.points = self.points.chunks(2).map(mean).collect();
            self.stride = self.stride.saturating_mul(2);
        }
    }

    /// Forgets everything after `step`: training went back to it.
    pub fn rewind(&mut self, step: u64) {
        self.points.retain(|(x, _)| *x <= step as f64);
        self.pending = (0.0, 0.0, 0);
        self.last = self.points.last().map(|p| p.1);
        if self.points.is_empty() {
            self.first = None;
        }
    }

    /// The points (step, value) by step, the unfinished one included.
    pub fn points(&self) -> Vec<(f64, f64)> {
        self.points.iter().copied().chain(self.pending_point()).collect()
    }

    /// Whether more than one value has come.
    pub fn is_curve(&self) -> bool {
        self.points.len() + self.pending.2 as usize > 1
    }

    /// First value, finite or not.
    pub fn first(&self) -> Option<f64> {
        self.first
    }

    /// Last value, finite or not.
    pub fn last(&self) -> Option<f64> {
        self.last
    }

    /// How many values were not finite.
    pub fn not_finite(&self) -> u64 {
        self.not_finite
    }

    fn pending_point(&self) -> Option<(f64, f64)> {
        let (steps, values, n) = self.pending;
        (n > 0).then(|| (steps / f64::from(n), values / f64::from(n)))
    }
}

fn mean(points: &[(f64, f64)]) -> (f64, f64) {
    let n = points.len() as f64;
    points.iter().fold((0.0, 0.0), |(x, y), p| (x + p.0 / n, y + p.1 / n))
}

/// A centred moving average over about a thirtieth of the points. The window shrinks towards both ends, so the
/// curve does not lag and its first and last values are the data's own.
pub(crate) fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let half = points.len() / 60;
    let at = |i: usize| {
        let h = half.min(i).min(points.len() - 1 - i);
        (points[i].0, mean(&points[i - h..=i + h]).1)
    };
    (0..points.len()).map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_curve_stays_small_and_keeps_its_mean() {
        let mut series = Series::default();
        let n = 100_000u64;
        (1..=n).for_each(|step| series.push(step, step as f64));
        let points = series.points();
        assert!(points.len() <= CAPACITY && points.len() >= CAPACITY / 2, "{}", points.len());
        assert!(points.iter().all(|(x, y)| (x - y).abs() < 1e-6), "a straight line stays one");
        assert!(points.windows(2).all(|w| w[0].0 < w[1].0));
        assert_eq!((series.first(), series.last()), (Some(1.0), Some(n as f64)));
    }

    #[test]
    fn what_is_not_finite_is_counted_and_not_drawn() {
        let mut series = Series::default();
        [1.0, f64::NAN, f64::INFINITY, 2.0].iter().zip(1..).for_each(|(v, step)| series.push(step, *v));
        assert_eq!(series.points(), [(1.0, 1.0), (4.0, 2.0)]);
        assert_eq!(series.not_finite(), 2);
    }

    #[test]
    fn going_back_forgets_what_comes_after() {
        let mut series = Series::default();
        (1..=10).for_each(|step| series.push(step, 10.0 - step as f64));
        series.rewind(4);
        assert_eq!(series.points().len(), 4);
        assert_eq!(series.last(), Some(6.0));
        series.rewind(0);
        assert_eq!((series.points().len(), series.first()), (0, None));
    }

    #[test]
    fn smoothing_keeps_lines_and_ends_and_takes_noise() {
        let line: Vec<_> = (0..600).map(|i| (f64::from(i), f64::from(i) * 0.5)).collect();
        assert!(smooth(&line).iter().zip(&line).all(|(a, b)| (a.1 - b.1).abs() < 1e-9));
        let noise: Vec<_> = (0..600).map(|i| (f64::from(i), if i % 2 == 0 { 1.0 } else { -1.0 })).collect();
        let smoothed = smooth(&noise);
        assert_eq!(smoothed[0].1, 1.0);
        assert!(smoothed[100..500].iter().all(|p| p.1.abs() < 0.1));
        assert!(smooth(&[]).is_empty());
    }
}
