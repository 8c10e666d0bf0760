// One file of an exported policy in C++, with OpenVINO. Inputs come from stdin and outputs go to stdout, a line each:
//
//     draft_probability 2x3 0.99 0.7 0.2 0.9 0.4 0.3
//     draft_length 2 3 3
//     forecast 2 0 1
//
// OpenVINO's Python package has all that a compiler needs:
//
//     pip install openvino
//     at=$(python -c 'import openvino; print(openvino.__path__[0])')
//     g++ -std=c++17 -O2 network.cpp -I$at/include $at/libs/libopenvino.so.* -Wl,-rpath,$at/libs -o network
//     ./network exported/ldlp_threshold/truncate.onnx < rows.txt

#include <cstdint>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <openvino/openvino.hpp>

class Network {
public:
    explicit Network(const std::string& file) {
        ov::Core core;
        // Full precision: where the processor has bfloat16, OpenVINO would use it, and decide otherwise.
        // One thread: the networks are small, and more threads only make them slower.
        compiled_ = core.compile_model(core.read_model(file), "CPU",
                                       ov::hint::inference_precision(ov::element::f32),
                                       ov::inference_num_threads(1));
        request_ = compiled_.create_infer_request();
    }

    // An input to write to, of a shape such as {batch, width}.
    ov::Tensor input(const std::string& name, const ov::Shape& shape) {
        ov::Tensor tensor(compiled_.input(name).get_element_type(), shape);
        request_.set_tensor(name, tensor);
        return tensor;
    }

    void run() { request_.infer(); }

    ov::Tensor output(const std::string& name) { return request_.get_tensor(name); }

    std::vector<std::string> outputs() const {
        std::vector<std::string> names;
        for (const auto& output : compiled_.outputs()) names.push_back(output.get_any_name());
        return names;
    }

private:
    ov::CompiledModel compiled_;
    ov::InferRequest request_;
};

// Calls `what` with a pointer to the values of a tensor (a handle: copies share them). Policies have three types.
template <typename What>
void with_values(ov::Tensor tensor, What what) {
    const auto type = tensor.get_element_type();
    if (type == ov::element::f32) what(tensor.data<float>());
    else if (type == ov::element::i64) what(tensor.data<std::int64_t>());
    else if (type == ov::element::boolean) what(static_cast<bool*>(tensor.data()));
    else throw std::runtime_error("no type of a policy: " + type.get_type_name());
}

int main(int count, char** arguments) {
    if (count != 2) {
        std::cerr << "usage: network FILE.onnx < rows\n";
        return 2;
    }
    Network network(arguments[1]);
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string name, dimensions;
        words >> name >> dimensions;
        ov::Shape shape;
        std::istringstream parts(dimensions);
        for (std::string part; std::getline(parts, part, 'x');) shape.push_back(std::stoul(part));
        const ov::Tensor tensor = network.input(name, shape);
        with_values(tensor, [&] (auto* values) {
            for (std::size_t i = 0; i < tensor.get_size(); ++i) words >> values[i];
        });
        if (!words) throw std::runtime_error("too few values for " + name);
    }
    network.run();
    std::cout.precision(9);  // enough digits to name every float32
    for (const auto& name : network.outputs()) {
        const ov::Tensor tensor = network.output(name);
        std::cout << name << ' ';
        for (std::size_t i = 0; i < tensor.get_shape().size(); ++i)
            std::cout << (i ? "x" : "") << tensor.get_shape()[i];
        with_values(tensor, [&] (const auto* values) {
            for (std::size_t i = 0; i < tensor.get_size(); ++i) std::cout << ' ' << values[i];
        });
        std::cout << '\n';
    }
}
