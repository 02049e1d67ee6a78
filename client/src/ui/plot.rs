//! A loss curve in braille characters: two by four dots a cell.

use super::series::{Series, smooth};

/// Size of a drawing, axes and labels included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    /// Columns, at least [`MIN_COLUMNS`].
    pub columns: usize,
    /// Rows of the curve itself; three more hold the legend and the x axis.
    pub rows: usize,
}

/// Below this width no curve is drawn.
pub(crate) const MIN_COLUMNS: usize = 24;

const VALIDATION_MARK: char = '●';

/// Draws the smoothed training loss as a line and each validation loss as a mark. `None` where fewer than two
/// values are known or the terminal is too narrow. Lines end in a newline and have no trailing blanks.
pub(crate) fn loss_curve(train: &Series, validation: &Series, size: Size) -> Option<String> {
    let (line, marks) = (smooth(&train.points()), validation.points());
    if line.len() < 2 || size.columns < MIN_COLUMNS || size.rows < 2 {
        return None;
    }
    let (first, last) = (line[0].0, line[line.len() - 1].0);
    let y = Range::of(line.iter().chain(&marks).map(|p| p.1))?;
    let ticks = y.ticks(size.rows);
    let margin = ticks.iter().map(|t| t.label.len()).max().unwrap_or(0);
    let columns = size.columns.checked_sub(margin + 2).filter(|&c| c >= 8)?;

    let mut grid = Grid::new(columns, size.rows);
    let mut previous = None;
    for x in 0..columns * 2 {
        let step = first + (last - first) * x as f64 / (columns * 2 - 1) as f64;
        let dot = y.dot(value_at(&line, step), size.rows * 4);
        grid.vertical(x, previous.unwrap_or(dot), dot);
        previous = Some(dot);
    }
    for (step, value) in &marks {
        // A validation before the first step stands at the left edge.
        let share = ((step - first) / (last - first)).clamp(0.0, 1.0);
        grid.mark((share * (columns - 1) as f64).round() as usize, y.dot(*value, size.rows * 4) / 4);
    }

    let mut out = format!("{:margin$}  loss", "");
    if line.len() >= 60 {
        out.push_str(" (smoothed)");
    }
    if !marks.is_empty() {
        out.push_str(&format!("   {VALIDATION_MARK} validation loss"));
    }
    out.push('\n');
    for row in 0..size.rows {
        let tick = ticks.iter().find(|t| t.row == row);
        let (label, axis) = tick.map_or(("", '│'), |t| (t.label.as_str(), '┤'));
        out.push_str(format!("{label:>margin$} {axis}{}", grid.row(row)).trim_end());
        out.push('\n');
    }
    out.push_str(&format!("{:margin$} └{}\n", "", "─".repeat(columns)));
    out.push_str(&format!("{:margin$}  {}\n", "", step_labels(first, last, columns)));
    Some(out)
}

/// First and last step at their ends of the axis, the middle one between them where there is room.
fn step_labels(first: f64, last: f64, columns: usize) -> String {
    let (left, right) = (format!("{first:.0}"), format!("{last:.0} steps"));
    let middle = format!("{:.0}", (first + last) / 2.0);
    let gap = columns.saturating_sub(left.len() + right.len()).max(1);
    if last - first < 4.0 || gap < middle.len() + 8 {
        return format!("{left}{}{right}", " ".repeat(gap));
    }
    // The middle label is centred under the middle of the axis, not of the gap.
    let before = (columns / 2).saturating_sub(left.len() + middle.len() / 2).clamp(2, gap - middle.len() - 2);
    format!("{left}{}{middle}{}{right}", " ".repeat(before), " ".repeat(gap - middle.len() - before))
}

/// Linear interpolation; `points` has at least two, by step.
fn value_at(points: &[(f64, f64)], step: f64) -> f64 {
    let after = points.partition_point(|p| p.0 < step).clamp(1, points.len() - 1);
    let ((x0, y0), (x1, y1)) = (points[after - 1], points[after]);
    let share = if x1 > x0 { ((step - x0) / (x1 - x0)).clamp(0.0, 1.0) } else { 1.0 };
    y0 + (y1 - y0) * share
}

/// Values from bottom to top of the drawing.
#[derive(Debug, Clone, Copy)]
struct Range {
    low: f64,
    high: f64,
}

struct Tick {
    row: usize,
    label: String,
}

impl Range {
    fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        // A flat curve runs through the middle.
        let pad = if high - low > high.abs().max(low.abs()) * 1e-9 { 0.0 } else { (high.abs() * 0.05).max(1e-3) };
        let range = Range { low: low - pad, high: high + pad };
        (range.low.is_finite() && range.high.is_finite() && (range.high - range.low).is_finite()).then_some(range)
    }

    /// Dot of a value among `dots`, the top one 0.
    fn dot(&self, value: f64, dots: usize) -> usize {
        let share = ((self.high - value) / (self.high - self.low)).clamp(0.0, 1.0);
        (share * (dots - 1) as f64).round() as usize
    }

    /// Round values (1, 2 or 5 times a power of ten apart), at most one a row.
    fn ticks(&self, rows: usize) -> Vec<Tick> {
        let wanted = (self.high - self.low) / (rows as f64 / 2.0).max(1.0);
        let power = 10f64.powf(wanted.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].iter().map(|m| m * power).find(|s| *s >= wanted * 0.999).unwrap_or(power * 10.0);
        let decimals = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
        let mut ticks: Vec<Tick> = Vec::new();
        let count = ((self.high - self.low) / step).ceil() as usize + 1;
        for i in 0..count.min(2 * rows) {
            let value = (self.low / step).ceil() * step + i as f64 * step;
            if value > self.high {
                break;
            }
            let row = self.dot(value, rows * 4) / 4;
            let label = if (1e-6..1e6).contains(&step) { format!("{value:.decimals$}") } else { format!("{value:.1e}") };
            if ticks.iter().all(|t| t.row != row && t.label != label) {
                ticks.push(Tick { row, label });
            }
        }
        ticks
    }
}

/// Cells of braille dots, some of them replaced by a mark.
struct Grid {
    columns: usize,
    cells: Vec<u8>,
    marks: Vec<bool>,
}

impl Grid {
    fn new(columns: usize, rows: usize) -> Self {
        Grid { columns, cells: vec![0; columns * rows], marks: vec![false; columns * rows] }
    }

    /// A line of dots in column `x` that joins the dot at `to` with its left neighbour's at `from`.
    fn vertical(&mut self, x: usize, from: usize, to: usize) {
        // The neighbour has its own dot already: start one beside it, so that slopes stay one dot thin.
        let (top, bottom) = match from.cmp(&to) {
            std::cmp::Ordering::Less => (from + 1, to),
            std::cmp::Ordering::Equal => (to, to),
            std::cmp::Ordering::Greater => (to, from - 1),
        };
        const BITS: [[u8; 4]; 2] = [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]];
        for dot in top..=bottom {
            self.cells[dot / 4 * self.columns + x / 2] |= BITS[x % 2][dot % 4];
        }
    }

    fn mark(&mut self, column: usize, row: usize) {
        self.marks[row * self.columns + column] = true;
    }

    fn row(&self, row: usize) -> String {
        let range = row * self.columns..(row + 1) * self.columns;
        let cells = self.cells[range.clone()].iter().zip(&self.marks[range]);
        let character = |(dots, marked): (&u8, &bool)| match (*marked, *dots) {
            (true, _) => VALIDATION_MARK,
            (false, 0) => ' ',
            (false, dots) => char::from_u32(0x2800 + u32::from(dots)).unwrap_or(' '),
        };
        cells.map(character).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn series(values: impl IntoIterator<Item = f64>) -> Series {
        let mut series = Series::default();
        values.into_iter().zip(1..).for_each(|(v, step)| series.push(step, v));
        series
    }

    const SIZE: Size = Size { columns: 30, rows: 4 };

    #[test]
    fn a_falling_line_falls_from_corner_to_corner() {
        let drawn = loss_curve(&series((0..50).map(|i| 5.0 - 0.08 * f64::from(i))), &Series::default(), SIZE).unwrap();
        // The first and last cell with dots of each row.
        let columns = |text: &str| -> Vec<(usize, usize)> {
            let dots =
                |l: &str| l.chars().enumerate().filter(|(_, c)| ('\u{2801}'..='\u{28ff}').contains(c)).map(|(i, _)| i).collect::<Vec<_>>();
            text.lines().skip(1).take(4).map(|l| (dots(l)[0], dots(l)[dots(l).len() - 1])).collect()
        };
        let rows = columns(&drawn);
        assert_eq!(rows[0].0, 3, "starts at the left edge\n{drawn}");
        assert_eq!(rows[3].1, 29, "ends at the right edge\n{drawn}");
        assert!(rows.windows(2).all(|w| w[1].0 >= w[0].1 && w[1].0 <= w[0].1 + 1), "each row goes on where the last ended\n{drawn}");
        assert!(drawn.contains("1 ") && drawn.contains("50 steps"), "{drawn}");
    }

    #[test]
    fn the_axis_has_round_labels_at_their_own_height() {
        let drawn =
            loss_curve(&series((0..100).map(|i| 6.0 - 0.04 * f64::from(i))), &Series::default(), Size { columns: 60, rows: 9 }).unwrap();
        let labels: Vec<(usize, f64)> = drawn
            .lines()
            .enumerate()
            .filter_map(|(i, l)| l.split_once('┤').and_then(|(label, _)| Some((i - 1, label.trim().parse().ok()?))))
            .collect();
        assert!(labels.len() >= 2, "{drawn}");
        let range = Range { low: 2.04, high: 6.0 };
        for (row, value) in labels {
            assert_eq!(range.dot(value, 36) / 4, row, "{value}\n{drawn}");
        }
    }

    #[test]
    fn validation_is_marked_where_it_was_measured() {
        let mut validation = Series::default();
        validation.push(0, 5.0);
        validation.push(50, 1.0);
        let drawn = loss_curve(&series((0..50).map(|i| 5.0 - 0.08 * f64::from(i))), &validation, SIZE).unwrap();
        let lines: Vec<&str> = drawn.lines().collect();
        assert!(lines[0].ends_with("● validation loss"));
        assert!(lines[1].contains("┤●") || lines[1].contains("│●"), "{drawn}");
        assert!(lines[4].ends_with('●'), "{drawn}");
    }

    #[test]
    fn a_flat_curve_runs_through_the_middle() {
        let drawn = loss_curve(&series([2.0; 10]), &Series::default(), Size { columns: 40, rows: 5 }).unwrap();
        let with_dots: Vec<usize> =
            drawn.lines().enumerate().filter(|(_, l)| l.chars().any(|c| ('\u{2801}'..='\u{28ff}').contains(&c))).map(|(i, _)| i).collect();
        assert_eq!(with_dots, [3], "{drawn}");
    }

    #[test]
    fn too_little_to_draw_draws_nothing() {
        assert!(loss_curve(&series([1.0]), &Series::default(), SIZE).is_none());
        assert!(loss_curve(&series([f64::NAN; 9]), &Series::default(), SIZE).is_none());
        assert!(loss_curve(&series([1.0, 2.0]), &Series::default(), Size { columns: 23, rows: 4 }).is_none());
    }

    proptest! {
        #[test]
        fn any_curve_keeps_to_its_size(
            values in proptest::collection::vec(any::<f64>(), 0..300),
            marks in proptest::collection::vec((any::<u64>(), any::<f64>()), 0..5),
            columns in 0usize..120, rows in 0usize..20,
        ) {
            let mut validation = Series::default();
            marks.iter().for_each(|(step, value)| validation.push(*step, *value));
            if let Some(drawn) = loss_curve(&series(values), &validation, Size { columns, rows }) {
                prop_assert_eq!(drawn.lines().count(), rows + 3);
                let axis = drawn.lines().nth(rows + 1).unwrap_or("");
                for line in drawn.lines().skip(1).take(rows + 1) {
                    prop_assert!(console::measure_text_width(line) <= console::measure_text_width(axis).max(columns), "{}", drawn);
                }
            }
        }
    }
}
