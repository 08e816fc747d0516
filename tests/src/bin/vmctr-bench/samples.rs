//! Repeated measurements of one thing.

/// At least one, each a finite number.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// The first one.
    pub fn of(first: f64) -> Self {
        let mut samples = Self(Vec::new());
        samples.push(first);
        samples
    }

    /// One more.
    pub fn push(&mut self, sample: f64) {
        assert!(sample.is_finite(), "{sample} is no measurement");
        self.0.push(sample);
    }

    /// In the order in which they were taken.
    pub fn all(&self) -> &[f64] {
        &self.0
    }

    /// The middle one, or the mean of the two in the middle.
    pub fn median(&self) -> f64 {
        let sorted = self.sorted();
        let middle = sorted.len() / 2;
        if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
    }

    /// The smallest and the largest.
    pub fn range(&self) -> (f64, f64) {
        let sorted = self.sorted();
        (sorted[0], sorted[sorted.len() - 1])
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(all: &[f64]) -> Samples {
        let mut samples = Samples::of(all[0]);
        all[1..].iter().for_each(|sample| samples.push(*sample));
        samples
    }

    #[test]
    fn the_median_is_the_middle_one_whatever_the_order() {
        for (all, median) in [
            (&[7.0][..], 7.0),
            (&[9.0, 1.0, 5.0], 5.0),
            (&[4.0, 1.0, 100.0, 2.0], 3.0),
            (&[2.0, 2.0, 2.0, 8.0, 1.0], 2.0),
        ] {
            assert_eq!(samples(all).median(), median, "{all:?}");
        }
    }

    #[test]
    fn the_range_goes_from_the_smallest_to_the_largest() {
        assert_eq!(samples(&[3.0, 1.0, 2.0]).range(), (1.0, 3.0));
        assert_eq!(samples(&[3.0]).range(), (3.0, 3.0));
    }

    #[test]
    #[should_panic(expected = "no measurement")]
    fn what_is_no_number_is_no_sample() {
        Samples::of(f64::NAN);
    }
}
