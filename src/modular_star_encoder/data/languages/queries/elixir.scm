(call target: (identifier) @keyword
    (arguments [
        (call target: (identifier) @name) (identifier) @name
        (binary_operator left: (call target: (identifier) @name))])) @function
(call target: (identifier) @keyword (arguments (alias) @name)) @scope
(comment) @comment
(string) @verbatim
