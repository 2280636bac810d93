// The Python modules _cuda and emulator in one file, since compiling pybind11's headers takes most of the
// time.
#include "cuda/bindings.cpp"
#include "emulated_device.h"
#include "emulator.h"
#include "faults.h"

PYBIND11_MODULE(emulator, m) {
    m.doc() = "Runs the CUDA kernels on the CPU; see emulated_device.h.";
    m.def("allocate", &emulator::allocate, py::arg("bytes"), py::arg("at_end"), "See emulator.h.");
    m.def("check_and_free", &emulator::check_and_free, "See emulator.h.");
    m.def(
        "set",
        [](int multiprocessors, int64_t shared_per_block, bool cooperative, bool clusters, bool backwards,
           bool late_copies) {
            emulator::settings = {multiprocessors, shared_per_block, cooperative,
                                  clusters,        backwards,        late_copies};
        },
        py::kw_only(), py::arg("multiprocessors") = 3, py::arg("shared_per_block") = 227 * 1024,
        py::arg("cooperative") = true, py::arg("clusters") = true, py::arg("backwards") = false,
        py::arg("late_copies") = false,
        "Sets the emulated device, the order in which threads run, and when copies are executed.");
    m.def("run_fault", &emulator::run_fault, py::arg("name"), py::arg("numbers"), py::arg("out"),
          py::arg("n"), py::arg("blocks"), py::arg("threads"), py::arg("correct"), "See faults.h.");
}
