//! The `open_enum!` declaration: an integer with names for the values that are known.

/// Declares a transparent integer newtype whose known values are constants with names.
///
/// Unlike a Rust enum it holds every value of its integer, because the peer chooses it. `name()` gives the constant's
/// name for messages, or `None` for a value that is not known.
macro_rules! open_enum {
    (
        $(#[$outer:meta])*
        pub enum $name:ident: $int:ty {
            $( $(#[$inner:meta])* $variant:ident = $value:expr, )+
        }
    ) => {
        $(#[$outer])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(transparent)]
        pub struct $name(pub $int);

        impl $name {
            $( $(#[$inner])* pub const $variant: Self = Self($value); )+

            /// Every value that has a name, in declaration order.
            pub const KNOWN: &'static [Self] = &[$( Self::$variant, )+];

            /// The name of a known value.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $( $value => Some(stringify!($variant)), )+
                    _ => None,
                }
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, concat!(stringify!($name), "({:#x})"), self.0),
                }
            }
        }

        impl From<$int> for $name {
            fn from(value: $int) -> Self {
                Self(value)
            }
        }
    };
}

pub(crate) use open_enum;
