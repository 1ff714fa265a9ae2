; events: moves inside its NMI handler, while a second NMI waits for the end of the first
;@ entry real16
%include "real16.inc"
ENDED equ 0x8f08                ; 1 when the first NMI's handler is about to return
start:
    call apic_on
    mov ax, 2
    mov bx, nmi
    call set_vector
    call nmi_to_self
    mov cx, 1000
second_is_late:
    nop
    loop second_is_late
    jmp failed

nmi_to_self:
    mov ecx, X2APIC_ID
    rdmsr
    mov edx, eax
    mov ecx, X2APIC_ICR
    mov eax, 0x400
    wrmsr
    ret

nmi:
    inc byte [TICKS]
    cmp byte [TICKS], 1
    jne second
    call nmi_to_self
    mov cx, 1000
masked:
    nop
    loop masked
    cmp byte [TICKS], 1         ; else the second one came while the first one lasted
    jne failed
    call be_moved
    cmp byte [TICKS], 1
    jne failed
    mov byte [ENDED], 1
    iret
second:
    cmp byte [ENDED], 1
    jne failed
    jmp passed
