; regs: a known value in every general register, and known flags
;@ entry long64
    bits 64
    org 0x100000
READY equ 0x200000
GO equ 0x200001
EXIT equ 0xf4
start:
    mov rax, 0x1111111111111111
    mov rbx, 0x2222222222222222
    mov rcx, 0x3333333333333333
    mov rdx, 0x4444444444444444
    mov rsi, 0x5555555555555555
    mov rdi, 0x6666666666666666
    mov rbp, 0x7777777777777777
    mov r8, 0x0888888888888888
    mov r9, 0x0999999999999999
    mov r10, 0x0aaaaaaaaaaaaaaa
    mov r11, 0x0bbbbbbbbbbbbbbb
    mov r12, 0x0ccccccccccccccc
    mov r13, 0x0ddddddddddddddd
    mov r14, 0x0eeeeeeeeeeeeeee
    mov r15, 0x0fffffffffffffff
    mov rsp, 0x00300000
    std                                 ; the direction flag, which `cmp` does not touch
    mov byte [READY], 1
moving:
    cmp byte [GO], 0
    je moving
    cmp rsp, 0x00300000
    jne failed
    pushfq
    test qword [rsp], 0x400
    jz failed
    add rsp, 8
    push rax
    sub rax, 0x11111111
    shr rax, 32
    cmp eax, 0x11111111
    jne failed
    pop rax
%macro IS 2
    mov rax, %2
    cmp %1, rax
    jne failed
%endmacro
    IS rbx, 0x2222222222222222
    IS rcx, 0x3333333333333333
    IS rdx, 0x4444444444444444
    IS rsi, 0x5555555555555555
    IS rdi, 0x6666666666666666
    IS rbp, 0x7777777777777777
    IS r8, 0x0888888888888888
    IS r9, 0x0999999999999999
    IS r10, 0x0aaaaaaaaaaaaaaa
    IS r11, 0x0bbbbbbbbbbbbbbb
    IS r12, 0x0ccccccccccccccc
    IS r13, 0x0ddddddddddddddd
    IS r14, 0x0eeeeeeeeeeeeeee
    IS r15, 0x0fffffffffffffff
    xor al, al
    out EXIT, al
failed:
    mov al, 1
    out EXIT, al
